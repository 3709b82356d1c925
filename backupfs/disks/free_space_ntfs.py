"""The free space of NTFS: the bits of its file $Bitmap.

Source: the Linux-NTFS project's documentation; ntfs-3g's layout.h and logfile.c.
"""

import struct
from collections.abc import Iterator

from backupfs.disks.bitmaps import clear_runs
from backupfs.disks.filesystem import Read, Unreadable

_LOG_FILE, _VOLUME, _BITMAP = 2, 3, 6  # numbers of records
_VOLUME_INFORMATION, _DATA, _ATTRIBUTE_LIST, _END = 0x70, 0x80, 0x20, 0xFFFFFFFF
# Dirty, to be upgraded or repaired, or in the middle of a change: those that ntfs-3g does not write to either.
_UNSOUND = 0xC027
_NO_CLIENT, _IS_CLEAN = 0xFFFF, 2
_MOST_RUNS = 1 << 16
_STEP = 1 << 20


def free_ranges(read: Read, size: int) -> Iterator[tuple[int, int]] | None:
    """Return the free ranges; None if it is no NTFS. Raises: Unreadable."""
    boot = read(0, 512)
    if boot[3:11] != b"NTFS    " or boot[510:] != b"\x55\xaa":
        return None
    return _Ntfs(read, size, boot).free()


class _NotUnmounted(Unreadable):
    """Something is still to be done by whoever mounts it."""


def is_unmounted(read: Read, size: int) -> bool:
    """Tell whether it was unmounted, as far as that can be read."""
    try:
        _Ntfs(read, size, read(0, 512))
    except _NotUnmounted:
        return False
    except (Unreadable, struct.error):
        return True
    return True


class _Ntfs:
    def __init__(self, read: Read, size: int, boot: bytes) -> None:
        self._read = read
        sector, per_cluster = struct.unpack_from("<HB", boot, 11)
        sectors, table = struct.unpack_from("<QQ", boot, 40)
        (record,) = struct.unpack_from("<b", boot, 64)
        if per_cluster >= 0x80:
            per_cluster = 1 << (256 - per_cluster) if per_cluster >= 0xF0 else 0
        self._cluster = sector * per_cluster
        if sector not in (512, 1024, 2048, 4096) or not per_cluster > 0 or self._cluster > 2 << 20:
            raise Unreadable("its boot sector makes no sense")
        self._record = 1 << -record if record < 0 else record * self._cluster
        self._table = table * self._cluster
        self._clusters = sectors // per_cluster
        if not 512 <= self._record <= 65536 or sectors * sector > size:
            raise Unreadable("its boot sector makes no sense, or it is larger than its volume")
        _, information = self._attribute(_VOLUME, _VOLUME_INFORMATION)
        if len(information) < 12 or struct.unpack_from("<H", information, 10)[0] & _UNSOUND:
            raise _NotUnmounted("it is marked as not unmounted, or as to be repaired")
        self._require_clean_log()

    def free(self) -> Iterator[tuple[int, int]]:
        """Yield the free ranges."""
        first = 0
        for part in self._content(_BITMAP):
            for low, high in clear_runs(part, min(len(part) * 8, self._clusters - first)):
                yield (first + low) * self._cluster, (first + high) * self._cluster
            first += len(part) * 8
            if first >= self._clusters:
                return
        raise Unreadable("its bitmap is too short")

    def _require_clean_log(self) -> None:
        page = next(self._content(_LOG_FILE), b"")[:4096]
        # What ntfs-3g leaves: it needs no log, and empties that of others.
        if page and page == b"\xff" * len(page):
            return
        if page[:4] != b"RSTR":
            raise Unreadable("its journal makes no sense")
        (place,) = struct.unpack_from("<H", page, 24)
        if place + 16 > len(page):
            raise Unreadable("its journal makes no sense")
        in_use, flags = struct.unpack_from("<HH", page, place + 12)
        if in_use != _NO_CLIENT and not flags & _IS_CLEAN:
            raise _NotUnmounted("it was not unmounted")

    def _content(self, number: int) -> Iterator[bytes]:
        """Yield the bytes of a file, as far as they were ever written."""
        is_resident, attribute = self._attribute(number, _DATA)
        if is_resident:
            yield attribute
            return
        first, _, runs_at = struct.unpack_from("<QQH", attribute, 16)
        (length,) = struct.unpack_from("<Q", attribute, 56)
        if first:
            raise Unreadable("a file that it needs is in several records")
        for count, cluster in _runs(attribute[runs_at:]):
            if cluster + count > self._clusters:
                raise Unreadable("a file that it needs lies behind its end")
            for at in range(0, count * self._cluster, _STEP):
                step = min(_STEP, count * self._cluster - at, length)
                if step <= 0:
                    return
                data = self._read(cluster * self._cluster + at, step)
                if len(data) != step:
                    raise Unreadable("it refers to what is behind the end of the volume")
                length -= step
                yield data
        if length:
            raise Unreadable("a file that it needs is not whole")

    def _attribute(self, number: int, wanted: int) -> tuple[bool, bytes]:
        """Return (whether it is resident, its value or all of it) of an attribute without a name."""
        record = bytearray(self._read(self._table + number * self._record, self._record))
        if record[:4] != b"FILE" or len(record) != self._record:
            raise Unreadable(f"its record {number} is none")
        fixups, count = struct.unpack_from("<HH", record, 4)
        if (count - 1) * 512 != self._record or fixups + count * 2 > 510:
            raise Unreadable(f"its record {number} makes no sense")
        for sector in range(1, count):
            if record[sector * 512 - 2 : sector * 512] != record[fixups : fixups + 2]:
                raise Unreadable(f"its record {number} was half written")
            record[sector * 512 - 2 : sector * 512] = record[fixups + sector * 2 : fixups + sector * 2 + 2]
        (at,) = struct.unpack_from("<H", record, 20)
        while at + 24 <= len(record):
            kind, length, is_elsewhere, name = struct.unpack_from("<IIBB", record, at)
            if kind == _END:
                break
            if length < 24 or at + length > len(record) or kind == _ATTRIBUTE_LIST:
                raise Unreadable(f"its record {number} makes no sense, or goes on in others")
            if kind == wanted and not name:
                attribute = bytes(record[at : at + length])
                if is_elsewhere:
                    if length < 64 or struct.unpack_from("<H", attribute, 12)[0]:
                        raise Unreadable("a file that it needs is compressed or encrypted")
                    return False, attribute
                size, start = struct.unpack_from("<IH", attribute, 16)
                return True, attribute[start : start + size]
            at += length
        raise Unreadable(f"its record {number} lacks an attribute")


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (clusters, first one) of a list of runs. Raises: Unreadable."""
    at = cluster = 0
    for _ in range(_MOST_RUNS):
        if at >= len(data) or not data[at]:
            return
        of_count, of_offset = data[at] & 15, data[at] >> 4
        count = int.from_bytes(data[at + 1 : at + 1 + of_count], "little")
        at += 1 + of_count
        cluster += int.from_bytes(data[at : at + of_offset], "little", signed=True)
        at += of_offset
        if not 0 < of_offset <= 8 or not 0 < of_count <= 8 or cluster < 0 or at > len(data):
            raise Unreadable("a file that it needs has holes, or lies nowhere")
        yield count, cluster
    raise Unreadable("a file that it needs is in more pieces than are believed")
