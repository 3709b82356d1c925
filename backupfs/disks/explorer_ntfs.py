"""What fs-explorer knows of NTFS and does not give: where compressed files have holes, and security descriptors.

Source: the NTFS documentation of the Linux-NTFS project, "Compression", "$Secure", "$STANDARD_INFORMATION"; ntfs-3g's
compress.c and security.c.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

from backupfs.disks.filesystem import READ, Entry, Extent, PartlyUnreadable

_STANDARD_INFORMATION, _SECURITY_DESCRIPTOR, _DATA = 0x10, 0x50, 0x80
_COMPRESSED = 0x0001
_SECURE = 9  # the file of all descriptors
_SECURITY_ID_AT = 52  # in the standard information
_MOST_OF_TOP = 3500
_MOST_DESCRIPTORS = 64 << 20
_DESCRIPTORS_STEP = 256 << 10  # each such part is followed by its copy
_DESCRIPTOR = struct.Struct("<IIQI")  # hash, id, offset, length with this head
_DESCRIPTORS = "backupfs descriptors"  # under which a tree keeps them
# What Linux takes.
_MOST_NAME, _MOST_VALUE = 255, 64 << 10


def attributes(tree: Any, entry: Entry) -> list[tuple[bytes, bytes]]:
    """Return the named streams of a file or directory and its security descriptor, as attributes that anything keeps.

    Of other entries there are none: what begins with `user.` cannot be set on them.
    Raises: PartlyUnreadable.
    """
    found: list[tuple[bytes, bytes]] = []
    problems: list[str] = []
    is_kept = entry.is_file or entry.is_directory
    for name, value in tree.xattrs(entry.handle).items():
        key = b"user." + os.fsencode(name)
        if not is_kept or len(key) > _MOST_NAME or len(value) > _MOST_VALUE:
            problems.append(f"its stream {name} of {len(value):,} bytes is more than an attribute can be")
        else:
            found.append((key, bytes(value)))
    if is_kept:
        try:
            descriptor = _descriptor(tree, tree._file(entry.handle.ref[0]))
            # mkntfs gives the top one of 4 KiB, mostly zeros: ntfs-3g refuses to show it, and ext4 has no room for it.
            if descriptor and (entry.name or len(descriptor) <= _MOST_OF_TOP):
                found.append((b"user.ntfs_acl", descriptor))
        except Exception as error:
            problems.append(f"its security descriptor cannot be read: {error}")
    found.sort()
    if problems:
        raise PartlyUnreadable("; ".join(problems), found)
    return found


def _descriptor(tree: Any, file: Any) -> bytes:
    own = file.find(_SECURITY_DESCRIPTOR)
    if own is not None:
        return bytes(tree._attr_bytes(own, _MOST_VALUE))
    information = file.find(_STANDARD_INFORMATION)
    if information is None or len(information.value) < _SECURITY_ID_AT + 4:
        return b""
    (number,) = struct.unpack_from("<I", information.value, _SECURITY_ID_AT)
    known: dict[int, bytes] | None = tree.ctx.options.get(_DESCRIPTORS)
    if known is None:
        stream = tree._file(_SECURE).find(_DATA, "$SDS")
        data = b"" if stream is None else tree._attr_bytes(stream, _MOST_DESCRIPTORS)
        known = tree.ctx.options[_DESCRIPTORS] = dict(_descriptors(data))
    return known.get(number, b"")


def _descriptors(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (id, descriptor) of all in $Secure:$SDS."""
    for low in range(0, len(data), 2 * _DESCRIPTORS_STEP):
        at, end = low, min(low + _DESCRIPTORS_STEP, len(data))
        while at + _DESCRIPTOR.size <= end:
            _, number, place, length = _DESCRIPTOR.unpack_from(data, at)
            if place != at or not _DESCRIPTOR.size <= length <= end - at:
                break
            yield number, data[at + _DESCRIPTOR.size : at + length]
            at += -(-length // 16) * 16


def compressed_data(tree: Any, node: Any) -> Any | None:
    """Return the attribute of a file's bytes if these are compressed in units; else None."""
    data = tree._file(node.ref[0]).find(_DATA)
    if data is None or data.resident or not data.flags & _COMPRESSED or not data.cu:
        return None
    return data


def parts_of_compressed(tree: Any, data: Any, size: int) -> Iterator[Extent]:
    """Yield where the bytes of a compressed file lie: units without a cluster are holes, whole ones lie as they are."""
    unit = tree.cluster_size << data.cu
    written = min(data.init_size, size)
    end = 0  # of what was yielded
    at = data.start_vcn * tree.cluster_size
    for cluster, count in data.runs:
        low, at = at, at + count * tree.cluster_size
        high = min(at, written)
        if cluster is None or low >= high:
            continue
        first, behind, last = -(-low // unit) * unit, high // unit * unit, -(-high // unit) * unit
        for start, stop, is_plain in (
            (low // unit * unit, first, False), (first, behind, True), (max(first, behind), last, False),
        ):  # fmt: skip
            start, stop = max(start, end), min(stop, size)
            if start >= stop:
                continue
            yield start - end, None
            if is_plain:
                place = cluster * tree.cluster_size + start - low
                for descriptor, offset, length in tree.ra.physical_ranges(place, stop - start):
                    yield length, None if descriptor is None else offset
            else:
                yield stop - start, READ
            end = stop
