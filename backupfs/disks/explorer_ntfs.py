"""What fs-explorer, the library, knows of NTFS and does not give: where compressed files have holes.

Source: the NTFS documentation of the Linux-NTFS project, "Compression"; ntfs-3g's compress.c.
"""

from collections.abc import Iterator
from typing import Any

from backupfs.disks.filesystem import READ, Extent

_DATA = 0x80
_COMPRESSED = 0x0001


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
