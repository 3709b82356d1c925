"""Logical volumes of LVM2: linear, striped, mirrored and thin ones, as volumes over those that hold their extents.

Of mirrors one copy that is whole is enough. What cannot be true, or is of a kind that is not read, is left out with
the reason. What is read is hostile: text that refers to itself, or to more than there is, ends with such a reason.
Source: lvm2, lib/format_text/import_vsn1.c and the import functions of its segment types; for copies of RAID
Linux, drivers/md/dm-raid.c.
"""

import struct
from typing import Any

from backupfs.disks.filesystem import Unreadable
from backupfs.disks.lvm import NotLvm, PhysicalVolume
from backupfs.disks.table import Parts, VolumeTable
from backupfs.disks.thin import Thin, ThinPool
from backupfs.errors import shown
from backupfs.snapshots.volumes import Range, Ranges, Stripes, is_name_of_copy

_SECTOR = 512
_MOST_EXTENT = 1 << 31  # sectors
_MOST_DEPTH = 16
# magic, features, devices, own number, events, failed devices, where recovery stands, where the first one stands
_RAID_SUPERBLOCK = struct.Struct("<4sIIIQQQQ")
_RAID_MAGIC = b"DmRd"
_RECOVERED = (1 << 64) - 1


class _NotShown(Exception):
    """A volume that is there for others."""


def add_groups(table: VolumeTable, members: list[tuple[int, PhysicalVolume]], done: set[str]) -> list[str]:
    """Add the logical volumes of groups to a table; return what of them is left out, with the reason.

    members: all physical volumes that there are, with their numbers in the table. done: groups that were added before;
    these are added to it.
    """
    remarks: list[str] = []
    newest: dict[str, PhysicalVolume] = {}
    for _, member in members:
        known = newest.get(member.group_id)
        if not member.metadata and not member.group:
            continue  # it is a place only
        if known is None or member.sequence > known.sequence:
            newest[member.group_id] = member
    places: dict[str, int] = {}
    for number, member in members:
        places.setdefault(member.uuid, number)
    for group_id, member in sorted(newest.items(), key=lambda item: item[1].group):
        if group_id not in done:
            done.add(group_id)
            remarks += _Group(table, member, places).add_all()
    return remarks


def lacks_of(members: list[tuple[int, PhysicalVolume]]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return what is to be known of physical volumes, by number, and the problems: of what group, nobody knows."""
    remarks: list[tuple[int, str]] = []
    problems: list[tuple[int, str]] = []
    known = {uuid for _, member in members for uuid in _uuids(member.metadata)}
    for number, member in members:
        if member.uuid not in known and member.damage:
            problems.append((number, f"it is a physical volume of LVM that cannot be read: {member.damage}"))
        elif member.uuid not in known and not member.group:
            remarks.append((number, "it is a physical volume of LVM without metadata that can be read"))
        elif member.damage:
            remarks.append((number, f"{member.damage}: another copy of it counts"))
    return remarks, problems


def _uuids(metadata: dict[str, Any]) -> set[str]:
    physical = metadata.get("physical_volumes")
    found = physical.values() if isinstance(physical, dict) else ()
    return {str(one.get("id")).replace("-", "") for one in found if isinstance(one, dict)}


class _Group:
    """One volume group."""

    def __init__(self, table: VolumeTable, member: PhysicalVolume, places: dict[str, int]) -> None:
        self._table = table
        self._group = member.group
        self._metadata = member.metadata
        self._places = places
        self._extent = 0
        self._physical: dict[str, Any] = {}
        self._logical: dict[str, Any] = {}
        self._numbers: dict[str, Range] = {}  # where logical volumes are that were made
        self._open: list[str] = []  # logical volumes that are being made
        self._pools: dict[str, tuple[ThinPool, Range] | str] = {}  # or why one cannot be read

    def add_all(self) -> list[str]:
        extent = self._metadata.get("extent_size")
        logical, physical = self._metadata.get("logical_volumes"), self._metadata.get("physical_volumes")
        if not isinstance(extent, int) or not 0 < extent < _MOST_EXTENT or not isinstance(physical, dict):
            return [f"the volume group {self._group} has no metadata that makes sense"]
        self._extent, self._physical = extent * _SECTOR, physical
        self._logical = logical if isinstance(logical, dict) else {}
        origins = self._snapshots()
        remarks: list[str] = []
        for name, volume in sorted(self._logical.items()):
            # What was made for one that fails stays, unseen: others may be made of it, too.
            self._open.clear()
            try:
                if "VISIBLE" in volume["status"]:
                    if name in origins:
                        raise NotLvm(f"it is an old snapshot of {shown(origins[name])}, which is not read")
                    self._show(name)
            except _NotShown:
                continue
            except (NotLvm, Unreadable) as error:
                remarks.append(f"the logical volume {shown(self._full_name(name))} is not shown: {error}")
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                remarks.append(
                    f"the logical volume {shown(self._full_name(name))} is not shown: its metadata makes no sense"
                )
        return remarks

    def _snapshots(self) -> dict[str, str]:
        """Return the volumes that hold what changed since a snapshot, with the names of the origins."""
        found: dict[str, str] = {}
        for volume in self._logical.values():
            segment = volume.get("segment1") if isinstance(volume, dict) else None
            if isinstance(segment, dict) and segment.get("type") == "snapshot":
                for key in ("cow_store", "merging_store"):
                    found[str(segment.get(key))] = str(segment.get("origin"))
        return found

    def _full_name(self, name: str) -> str:
        """Return a name as device-mapper makes it."""
        return f"{self._group.replace('-', '--')}-{name.replace('-', '--')}"

    def _show(self, name: str) -> None:
        known = self._numbers.get(name)
        if known is not None:
            self._table.show(known[1])
        else:
            self._add(name, self._parts(name), is_shown=True)

    def _add(self, name: str, parts: list[Parts], is_shown: bool) -> Range:
        """Add a volume of parts that follow each other."""
        made_of = parts[0]
        if len(parts) > 1:
            ranges: list[Range] = []
            for number, part in enumerate(parts, 1):
                if isinstance(part, Ranges):
                    ranges += part.ranges
                else:
                    inner = self._table.add(f"{self._full_name(name)}.segment{number}", part, is_shown=False)
                    ranges.append((part.size, inner, 0))
            made_of = Ranges(ranges)
        number = self._table.add(self._full_name(name), made_of, is_shown)
        self._numbers[name] = (made_of.size, number, 0)
        return self._numbers[name]

    def _place(self, name: str) -> Range:
        """Return where a logical volume is, as one range; it is made if it must be."""
        known = self._numbers.get(name)
        if known is not None:
            return known
        parts = self._parts(name)
        # Copies keep their names, by which it is known that they must not be changed alone.
        is_copy = is_name_of_copy(name)
        if len(parts) == 1 and isinstance(parts[0], Ranges) and len(parts[0].ranges) == 1 and not is_copy:
            [place] = parts[0].ranges
            return place
        return self._add(name, parts, is_shown=False)

    def _parts(self, name: str) -> list[Parts]:
        """Return what the segments of a volume are."""
        if name in self._open or len(self._open) >= _MOST_DEPTH:
            raise NotLvm("it is made of itself")
        self._open.append(name)
        volume = self._logical[name]
        found: list[Parts] = []
        position = 0
        for number in range(1, _number(volume["segment_count"]) + 1):
            segment = volume[f"segment{number}"]
            start, count = _number(segment["start_extent"]), _number(segment["extent_count"])
            if start != position or count < 1:
                raise NotLvm("its segments do not follow each other")
            part = self._part(segment, count * self._extent)
            if part.size != count * self._extent:
                raise NotLvm("a segment of it does not have the size that it says")
            found.append(part)
            position += count
        if not found:
            raise NotLvm("it has no extents")
        self._open.pop()
        return found

    def _part(self, segment: dict[str, Any], length: int) -> Parts:
        match segment["type"]:
            case "striped" if segment["stripe_count"] == 1:
                [place, first] = segment["stripes"]
                return Ranges([self._physical_range(place, first, length)])
            case "striped":
                places = segment["stripes"]
                if len(places) != 2 * segment["stripe_count"]:
                    raise NotLvm("it has another number of stripes than it says")
                pairs = list(zip(places[::2], places[1::2], strict=True))
                each = length // len(pairs)
                return self._stripes(segment, [self._physical_range(place, first, each) for place, first in pairs])
            case "raid0" | "raid0_meta":
                names = segment["raid0_lvs"] if "raid0_lvs" in segment else segment["raids"]
                if len(names) == 2 * segment["stripe_count"]:
                    names = names[1::2]  # every other one is metadata
                if len(names) != segment["stripe_count"]:
                    raise NotLvm("it has another number of stripes than it says")
                return self._stripes(segment, [_cut(self._place(name), 0, length // len(names)) for name in names])
            case "raid1":
                if segment.get("data_offset"):
                    raise NotLvm("it is being reshaped, which is not read")
                names = segment["raids"]
                if len(names) != 2 * segment["device_count"] or not names:
                    raise NotLvm("it has another number of copies than it says")
                return Ranges([_cut(self._whole_copy(names[::2], names[1::2]), 0, length)])
            case "mirror":
                names, firsts = segment["mirrors"][::2], segment["mirrors"][1::2]
                places, reason = self._copies(names)
                if not places:
                    raise reason
                at = min(places)
                return Ranges([_cut(places[at], _number(firsts[at]) * self._extent, length)])
            case "thin":
                return self._thin(segment, length)
            case "thin-pool" | "snapshot":
                raise _NotShown
            case kind:
                raise NotLvm(f"it is of the type {shown(str(kind))}, which is not read")

    def _physical_range(self, place: str, first: object, length: int) -> Range:
        physical = self._physical[place]
        number = self._places.get(str(physical["id"]).replace("-", ""))
        # One that went away and came back has what it had then.
        if number is None or "MISSING" in physical.get("flags", ()):
            raise NotLvm("a physical volume of it is missing")
        start = _number(physical["pe_start"]) * _SECTOR + _number(first) * self._extent
        if start + length > self._table.size(number):
            raise NotLvm("it goes beyond its disks")
        return length, number, start

    def _stripes(self, segment: dict[str, Any], legs: list[Range]) -> Stripes:
        stripe = _number(segment["stripe_size"]) * _SECTOR
        if not stripe or legs[0][0] % stripe:
            raise NotLvm("its stripes make no sense")
        return Stripes(stripe, legs)

    # Copies.

    def _copies(self, names: list[str]) -> tuple[dict[int, Range], NotLvm]:
        """Return those copies that are there, and why another one is not."""
        found: dict[int, Range] = {}
        reason = NotLvm("it has no copies")
        for at, name in enumerate(names):
            kept = list(self._open)
            try:
                found[at] = self._place(name)
            except NotLvm as error:
                self._open = kept
                reason = error
        return found, reason

    def _whole_copy(self, notes: list[str], names: list[str]) -> Range:
        """Return the copy that is whole, by the notes that RAID keeps beside each."""
        copies, reason = self._copies(names)
        if not copies:
            raise reason
        superblocks: dict[int, tuple[int, int, int]] = {}  # events, failed devices, where recovery stands
        places, _ = self._copies(notes)
        for at, (_, volume, start) in places.items():
            block = self._table.read(volume, start, _SECTOR)
            if block[:4] == _RAID_MAGIC and len(block) == _SECTOR:
                _, _, _, own, events, failed, recovery, _ = _RAID_SUPERBLOCK.unpack_from(block)
                if own == at:
                    superblocks[at] = events, failed, recovery
        if superblocks:
            newest, failed, _ = max(superblocks.values())
            for at in list(copies):
                events, _, recovery = superblocks.get(at, (-2, 0, 0))
                if events + 1 < newest or failed >> at & 1 or recovery != _RECOVERED:
                    del copies[at]
        if not copies:
            raise NotLvm("no copy of it that is there is whole")
        return copies[min(copies)]

    # Thin volumes.

    def _thin(self, segment: dict[str, Any], length: int) -> Parts:
        name = str(segment["thin_pool"])
        if name not in self._pools:
            kept = list(self._open)
            try:
                self._pools[name] = self._pool(self._logical[name]["segment1"])
            except (NotLvm, Unreadable) as error:
                self._open = kept
                self._pools[name] = str(error)
        found = self._pools[name]
        if isinstance(found, str):
            raise NotLvm(f"its pool {shown(name)} cannot be read: {found}")
        pool, data = found
        origin = self._place(str(segment["external_origin"])) if "external_origin" in segment else None
        try:
            return Thin(pool, _number(segment["device_id"]), length, data, origin)
        except Unreadable as error:
            raise NotLvm(f"its pool {shown(name)} cannot be read: {error}") from error

    def _pool(self, segment: dict[str, Any]) -> tuple[ThinPool, Range]:
        if segment["type"] != "thin-pool":
            raise NotLvm("it is no pool")
        size, volume, start = self._place(segment["metadata"])
        data = self._place(segment["pool"])
        table = self._table

        def read(offset: int, length: int) -> bytes:
            return table.read(volume, start + offset, length)

        return ThinPool(read, size, _number(segment["chunk_size"]) * _SECTOR, data[0]), data


def _cut(place: Range, start: int, length: int) -> Range:
    size, volume, offset = place
    if start + length > size:
        raise NotLvm("a part of it is smaller than it says")
    return length, volume, offset + start


def _number(value: object) -> int:
    """Return a number of the metadata. Raises: ValueError if it is none."""
    if not isinstance(value, int) or value < 0:
        raise ValueError("no number")
    return value
