"""Which free space of file systems may be left out of an image: what a reader says is free, and a check proves.

A confined process reads the file system (disks/free_space.py). Then the system's own tool checks the volume as it would
read with zeros in place of all that is said to be free. That no extent of a file lies in it is shown while files are
looked through (image_files.py). A volume that fails any of these is stored whole.
"""

import itertools
import pickle
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from backupfs.disks import sandbox
from backupfs.disks.checkers import check_volume
from backupfs.disks.filesystem import Read, Unreadable
from backupfs.disks.free_space import find_free_space
from backupfs.disks.layout import Layout
from backupfs.disks.lvm import NotLvm, read_physical_volume
from backupfs.disks.ranges import Ranges, joined, overlapping, without
from backupfs.disks.table import VolumeReader, VolumeTable
from backupfs.errors import MountError, shown
from backupfs.forked import Line, fork
from backupfs.fuse.one_file import presented
from backupfs.usecases.events import Remark, Report

_PATIENCE_S = 300.0
_BATCH = 4096
# What is shorter is not worth its place: it holds no whole chunk of a disk.
_LEAST = 32 << 10
_MOST_RANGES = 1 << 20


class _Found(NamedTuple):
    form: str


class _Free(NamedTuple):
    numbers: bytes  # start, end, start, end, … of 64 bits


class _Done(NamedTuple):
    pass


class _Failed(NamedTuple):
    reason: str


def find_free(layout: Layout, report: Report) -> dict[int, Ranges]:
    """Return the free ranges of volumes, by their numbers, as far as a check of the rest is clean.

    It forks, and says of each volume that is to be stored whole why. Raises: SourceError.
    """
    found: dict[int, Ranges] = {}
    for number in layout.undivided:
        try:
            _require_alone(layout, number)
            free = _proven(layout.reader(number), layout.table.size(number))
        except Unreadable as error:
            name = shown(layout.table.name(number))
            report(Remark(f"{name} is stored whole, its free space too: {error}"))
        else:
            if free:
                found[number] = free
    return found


def _require_alone(layout: Layout, number: int) -> None:
    """Refuse a volume whose bytes may be somebody else's, too. Raises: Unreadable."""
    table = layout.table
    if not table.on_disks(number):
        raise Unreadable("its bytes lie scattered over its disks, or encrypted")
    # An old snapshot of LVM, which is not shown, has what it did not keep itself from the volume that it is one of.
    if layout.lacks and any(_is_of_lvm(layout, base) for base in table.below(number) - {number}):
        raise Unreadable(f"what else is in its volume group is not known: {layout.lacks[0]}")


def _is_of_lvm(layout: Layout, number: int) -> bool:
    try:
        return read_physical_volume(layout.reader(number).read) is not None
    except NotLvm:
        return True


def _proven(reader: VolumeReader, size: int) -> Ranges:
    """Return the free ranges of a volume. Raises: Unreadable, which says why there are none to be used."""
    form, free = _said_by_reader(reader, size)
    try:
        with presented(lambda offset, length: with_zeros(reader.read, free, offset, length), size) as path:
            checked = check_volume(Path(path), size, is_writable=False)
    except (MountError, OSError) as error:
        raise Unreadable(f"it cannot be shown to {form}'s own check: {error}") from error
    if checked.sound is not True:
        raise Unreadable(f"with zeros there its check fails: {checked.words}")
    return free


def with_zeros(read: Read, free: Ranges, offset: int, length: int) -> bytes:
    """Return bytes of a volume as they are once what is free is left out."""
    data = bytearray(read(offset, length))
    end = offset + len(data)
    for low, high in overlapping(free, offset, end):
        low, high = max(low, offset), min(high, end)
        data[low - offset : high - offset] = bytes(high - low)
    return bytes(data)


def _said_by_reader(reader: VolumeReader, size: int) -> tuple[str, Ranges]:
    """Return (form, free ranges) by the word of a confined process. Raises: Unreadable."""

    def run(line: Line) -> None:
        _tell_free(line, reader, size)

    process = fork(run, lambda error: _Failed(f"its reader failed: {error}"), [])
    form, found = "", list[tuple[int, int]]()
    try:
        for message in process.messages(_PATIENCE_S, (_Found, _Free, _Done, _Failed)):
            match message:
                case _Found(str(form)):
                    pass
                case _Free(bytes(data)):
                    numbers = array("Q", data)
                    found += zip(numbers[::2], numbers[1::2], strict=True)
                case _Done():
                    break
                case _Failed(reason):
                    raise Unreadable(shown(f"{reason}"[:300]))
        else:
            raise Unreadable("the reader of its free space ended before its work did")
    except TimeoutError:
        raise Unreadable("the reader of its free space says nothing any more") from None
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError) as error:
        raise Unreadable(f"the reader of its free space said what makes no sense: {error}") from error
    finally:
        process.kill()
    free = joined(found)
    if free and free[-1][1] > size:
        raise Unreadable("it says that what is behind its end is free")
    return form, free


def _tell_free(line: Line, reader: VolumeReader, size: int) -> None:
    """Be the process."""
    sandbox.confine([*reader.descriptors(), *line.descriptors])
    try:
        space = find_free_space(reader.read, size)
        if space is None:
            line.send(_Failed("it holds no file system whose free space can be told"))
            return
        line.send(_Found(space.form))
        worth = ((start, end) for start, end in space.ranges if end - start >= _LEAST)
        few = itertools.islice(worth, _MOST_RANGES)
        while batch := list(itertools.islice(few, _BATCH)):
            line.send(_Free(array("Q", itertools.chain.from_iterable(batch)).tobytes()))
        line.send(_Done())
    except Exception as error:
        line.send(_Failed(f"{error}" or type(error).__name__))


def free_of_disk(layout: Layout, disk: int, free: Mapping[int, Ranges]) -> Ranges:
    """Return what of a disk may be left out: what is free in a volume, and not in use in any other.

    free: of volumes, by number. Volumes may lie over each other, as snapshots do, and as tables that are wrong say.
    """
    left_out: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    for number in layout.undivided:
        position = 0
        own = free.get(number, [])
        places = layout.table.on_disks(number)
        if not places:
            kept += _all_on_disk(layout.table, number, disk)
        for length, at, start in places:
            if at == disk:
                end = position + length
                inside = [(max(low, position), min(high, end)) for low, high in overlapping(own, position, end)]
                shift = start - position
                left_out += ((low + shift, high + shift) for low, high in inside)
                kept += ((low + shift, high + shift) for low, high in without([(position, end)], inside))
            position += length
    return list(without(joined(left_out), joined(kept)))


def _all_on_disk(table: VolumeTable, number: int, disk: int) -> Iterator[tuple[int, int]]:
    """Yield what of a disk a volume may be made of, however it is."""
    left = [(table.size(number), number, 0)]
    while left:
        length, base, start = left.pop()
        made_of = table.made_of(base)
        if made_of is not None:
            # All of it: what a part of it is made of may be anywhere.
            left += made_of.bases()
        elif base == disk:
            yield start, start + length
