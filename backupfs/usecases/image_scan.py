"""The scanning side of an image: disks in chunks of one size, aligned, without what is zero.

One process begins and cuts each disk into ranges; those who have nothing to do take some. What is not new costs reading
and hashing. A chunk is 32 KiB: a random write of 4 KiB stores so much again, and a terabyte has 34 million of them in
the index. What is zero is a hole, as it is in a disk that was made sparse.
"""

import contextlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from blake3 import blake3

from backupfs.codec.sealing import Kind
from backupfs.disks.hints import Claim, Hints, Span
from backupfs.disks.layout import Layout
from backupfs.disks.ranges import Ranges, whole_chunks
from backupfs.disks.source import DiskSource
from backupfs.errors import DamagedObject, PathNotFound, StoreError, shown
from backupfs.ids import ChunkId
from backupfs.localfs import reading
from backupfs.localfs.selection import Selection, SelectionRules
from backupfs.repository.repository import Repository
from backupfs.repository.slots import Slots
from backupfs.repository.writer import ChunkSaver, WriteSizes
from backupfs.snapshots.content import CHUNK, EXTENT, HOLE, Content, ContentBuilder
from backupfs.snapshots.node import NANOSECONDS, STAT_ROW, Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import DISK, Volume
from backupfs.snapshots.walk import find_path, tree_of, walk
from backupfs.usecases.archive_context import ArchiveContext
from backupfs.usecases.archive_files import FileStorer
from backupfs.usecases.events import Remark
from backupfs.usecases.image_files import Looked, Place, VolumeFiles, VolumeTree
from backupfs.usecases.image_free import free_of_disk
from backupfs.usecases.image_hints import DiskBefore, DiskHints, look, volume_before
from backupfs.usecases.image_unread import UNREAD, lines_of, split_lines, unread_before, unread_content, volume_line
from backupfs.usecases.image_volumes import recorded
from backupfs.usecases.scanner import Root, Scanner
from backupfs.usecases.stored_disk import StoredDisk

DISK_CHUNK = 32 << 10
# What one process does at a time, and what is read at a time.
_RANGE = 64 << 20
_READ = 1 << 20
# Ranges given away or done whose segments are not yet in order.
_MOST_PENDING = 32

_ZEROS = bytes(DISK_CHUNK)
_ZERO_START = _ZEROS[:16]

Cuts = list[tuple[int, bytes]]  # (length, id of the chunk; empty for a hole)


@dataclass(frozen=True, slots=True)
class DiskRoot(Root):
    """`/` of an image, with the volumes that its files refer to."""

    volumes: tuple[Volume, ...]
    has_left_out: bool  # free space of file systems


@dataclass(frozen=True, slots=True)
class RangeTask:
    """A part of a disk, to be stored by somebody else."""

    disk: int
    start: int
    end: int
    said: tuple[Span, ...]  # of each part of it


@dataclass(frozen=True, slots=True)
class WalkTask:
    """A volume whose files are to be stored by somebody else."""

    number: int  # in the table of volumes


def image_scan(
    repository: Repository,
    disks: list[DiskSource],
    layout: Layout,
    parent: Snapshot | None,
    hints: Mapping[str, Hints],
    free: Mapping[int, Ranges],
    taken_ns: int,
    sizes: WriteSizes,
    slots: Slots,
    scanner: Scanner,
    begins: bool,
    again: bool = False,
) -> Root | None:
    """Be one scanning process: store all disks or nothing, then do tasks; return `/` for all disks.

    again: go through all volumes, those too whose files the parent has.
    """
    keyring = repository.keyring
    data = ChunkSaver(Kind.DATA_PACK, repository.data_index, slots, scanner.send, sizes.block)
    trees = ChunkSaver(Kind.TREE_PACK, repository.tree_index, slots, scanner.send, sizes.block)
    trees.distrusts = scanner.distrusts
    context = ArchiveContext(
        keyring.chunk_id_key(tree=True), keyring.page_cut_key(), trees,
        Selection(SelectionRules(), frozenset(), frozenset()), scanner, {},
    )  # fmt: skip
    id_key = keyring.chunk_id_key(tree=False)
    cut_sizes = repository.config.cut_sizes
    files = FileStorer(id_key, keyring.file_cut_seed(), cut_sizes, data, context.save_tree, scanner.send)
    said = [_hints_of(source, hints, parent, repository, scanner) for source in disks]
    storer = DiskStorer(disks, layout, parent, said, free, repository.trees.load, context, data, files, id_key, again)
    scanner.serve(storer.do)
    root = storer.store_all(taken_ns) if begins else None
    if root is None:
        scanner.work_to_the_end()
    data.flush()
    trees.flush()
    context.tell_counts(at_once=True)
    return root


class DiskStorer:
    """Reads disks and saves their chunks. Belongs to one scanning process."""

    def __init__(
        self,
        disks: list[DiskSource],
        layout: Layout,
        parent: Snapshot | None,
        said: list[DiskHints],
        free: Mapping[int, Ranges],
        load: Callable[[ChunkId], bytes | memoryview],
        context: ArchiveContext,
        data: ChunkSaver,
        files: FileStorer,
        id_key: bytes,
        again: bool = False,
    ) -> None:
        """Take the parts.

        parent: the image before, whose files stand where a volume is the same. said: of each disk, by the parent.
        free: of volumes, by number: what may be left out if no file lies there. load: gives tree chunks.
        files: stores what has no place in a disk. id_key: names chunks.
        again: go through volumes whose files the parent has, too; they stand where that fails.
        """
        self._disks = disks
        self._layout = layout
        self._parent = parent
        self._said = said
        self._free = free
        self._load = load
        self._files = files
        self._context = context
        self._data = data
        self._id_key = id_key
        self._again = again
        self._buffer = memoryview(bytearray(_READ))

    def store_all(self, taken_ns: int) -> DiskRoot:
        """Store all disks and the tree that shows them; return `/`."""
        layout = self._layout
        looked: dict[int, Looked] = {}
        free = self._proven_free(looked)
        # What is not compared with anything is walked while the disks are read.
        others = [number for number in layout.undivided if number not in self._free]
        walks = {} if self._parent is not None else self._give_walks(others)
        shown: dict[bytes, dict[bytes, tuple[Content, int]]] = {b"disks": {}, b"volumes": {}}
        volumes: list[Volume] = []
        meters: list[_DataMeter] = []
        has_left_out = False
        for number, source in enumerate(self._disks):
            meter = _DataMeter({0, source.size} | _places_of(layout, number))
            left_out = list(whole_chunks(free_of_disk(layout, number, free), DISK_CHUNK, source.size))
            has_left_out = has_left_out or bool(left_out)
            content = self._store_disk(number, source, self._proven(number, source, left_out), meter)
            volumes.append(Volume(source.name, DISK, source.size, meter.between(0, source.size), content))
            shown[b"disks"][source.name.encode() + b".raw"] = (content, source.size)
            meters.append(meter)
        for laid in layout.volumes:
            number = len(volumes)
            data_size = self._data_size(number, meters, volumes)
            volume = recorded(laid, data_size, self._context.save_tree)
            volumes.append(volume)
            if laid.is_shown:
                content = volume.content or [[laid.size, EXTENT, number, 0]]
                shown[b"volumes"][laid.name.encode() + b".raw"] = (content, laid.size)
        known = self._known_trees(volumes, others)
        left = [number for number in others if self._again or number not in known]
        walks |= self._give_walks(number for number in left if number not in walks)
        for number, task in walks.items():
            found: Looked = self._context.scanner.result_of(task)
            # What cannot be read again stands as it was.
            looked[number] = found if found.tree is not None or number not in known else known[number]
        for number in known.keys() - looked.keys():
            looked[number] = known[number]
            self._tell_known(volumes[number].name, known[number])
        for number, found in looked.items():
            # What is all zeros was never made anything.
            if found.nothing and number not in layout.plain and volumes[number].data_size:
                looked[number] = self._with_nothing(volumes[number].name, found)
        self._context.counts.files_skipped += len(layout.problems)
        by_name = {volumes[number].name.encode(): looked[number] for number in looked}
        return self._root(shown, by_name, volumes, has_left_out, taken_ns)

    def _proven_free(self, looked: dict[int, Looked]) -> dict[int, Ranges]:
        """Look through the volumes of which something is to be left out; return of which it may be.

        looked: gets what was found in them.
        """
        proven: dict[int, Ranges] = {}
        send = self._context.scanner.send
        for number, task in self._give_walks(self._free).items():
            found = looked[number] = self._context.scanner.result_of(task)
            name, free = shown(self._layout.table.name(number)), self._free[number]
            if found.tree is None:
                send(Remark(f"{name} is stored whole, its free space too: its files could not be looked through"))
                continue
            if found.in_free:
                send(Remark(f"{name} is stored whole: {found.in_free} lies where it says that nothing is in use"))
                continue
            proven[number] = free
            size = sum(end - start for start, end in free)
            send(Remark(f"of {name}, {size / 2**30:,.2f} GiB of free space are left out: they are zeros in the image"))
        return proven

    def _data_size(self, number: int, meters: "list[_DataMeter]", before: list[Volume]) -> int:
        """Return how many bytes of a volume are in no hole; where that is not seen at once, it is what may be."""
        own = self._layout.own_data_size(number)
        if own is not None:
            return own
        total = 0
        for (length, base, start), is_on_disk in self._layout.counted(number):
            if is_on_disk:
                total += meters[base].between(start, start + length)
            else:
                total += before[base].data_size if length == before[base].size else length
        return total

    def _give_walks(self, numbers: Iterable[int]) -> dict[int, int]:
        """Give away the walks through volumes; return the number of each task."""
        return {number: self._context.scanner.give(WalkTask(number)) for number in numbers}

    def _known_trees(self, volumes: list[Volume], numbers: list[int]) -> dict[int, Looked]:
        """Return what the parent has of those of some volumes that are the same there, bit for bit."""
        parent = self._parent
        if parent is None:
            return {}
        same = {number for number, volume in enumerate(volumes) if parent.volumes[number : number + 1] == (volume,)}
        found: dict[int, Looked] = {}
        told = frozenset(lines_of(self._layout))
        for number in numbers:
            if self._layout.table.below(number) <= same:
                with contextlib.suppress(PathNotFound, DamagedObject, StoreError):
                    node = find_path(parent, b"/files/" + volumes[number].name.encode(), self._load)
                    if not node.is_directory:
                        continue  # Images of before may have such a top, of a superblock that is damaged.
                    lines = unread_before(parent, volumes[number].name, self._load)
                    tree = VolumeTree(tree_of(node), node.row, self._context.save_xattrs(node.xattrs))
                    self._count(node)
                    found[number] = Looked(tree, tuple(line for line in lines if line not in told))
        return found

    def _tell_known(self, name: str, known: Looked) -> None:
        """Say of a volume that is not looked through again what could not be read in it."""
        remarks, count = split_lines(known.unread, name)
        for remark in remarks:
            self._context.scanner.send(Remark(remark))
        if count:
            self._context.counts.files_skipped += count
            self._context.scanner.send(Remark(
                f"{shown(name)} is as it was, and {count:,} of it could not be read then: files/.unread in the image "
                "lists what and why"
            ))  # fmt: skip

    def _with_nothing(self, name: str, found: Looked) -> Looked:
        """Say of a volume that it has no files, and note it."""
        self._context.scanner.send(Remark(f"{shown(name)}: {shown(found.nothing)}"))
        return replace(found, unread=(*found.unread, volume_line(name, found.nothing)))

    def _count(self, top: Node) -> None:
        """Count what a tree of the parent holds, as its walk would have."""
        directories = [node.is_directory for _, node in walk(top, b"", self._load)]
        self._context.counts.files += directories.count(False)
        self._context.counts.directories += directories.count(True) + 1

    def do(self, task: "RangeTask | WalkTask") -> "Cuts | Looked":
        """Do what was given away."""
        return self.store_range(task) if isinstance(task, RangeTask) else self._store_files(task.number)

    def _store_files(self, number: int) -> Looked:
        table = self._layout.table
        reader, free = self._layout.reader(number), self._free.get(number, [])
        place = Place(table.name(number), number, table.size(number), reader, free)
        return VolumeFiles(self._context, self._files, place).store()

    def _root(
        self,
        shown: dict[bytes, dict[bytes, tuple[Content, int]]],
        looked: dict[bytes, Looked],
        volumes: list[Volume],
        has_left_out: bool,
        taken_ns: int,
    ) -> DiskRoot:
        folder = _row(stat.S_IFDIR | 0o755, 0, 0, taken_ns)
        top = self._context.builder()
        folders: dict[bytes, ChunkId] = {}
        inode = 0
        for folder_name, files in shown.items():
            builder = self._context.builder()
            for name, (content, size) in sorted(files.items()):
                inode += 1
                self._context.add_plain(builder, name, _row(stat.S_IFREG | 0o400, size, inode, taken_ns), content)
            folders[folder_name] = builder.finish()
        builder = self._context.builder()
        unread = lines_of(self._layout)
        unread += [line for _, found in sorted(looked.items()) for line in found.unread]
        if unread:
            content, size = unread_content(unread, self._context.save_tree)
            row = _row(stat.S_IFREG | 0o400, size, inode + 1, taken_ns)
            self._context.add_plain(builder, UNREAD, row, content)
        for name, found in sorted(looked.items()):
            tree = found.tree
            if tree is None:
                continue
            _, uid, gid, *_ = STAT_ROW.unpack(tree.row)
            builder.add(name, tree.row, tree.tree, 0, tree.xattrs, 0, (uid, b""), (gid, b""))
        folders[b"files"] = builder.finish()
        for folder_name, folder_tree in sorted(folders.items()):
            self._context.add_plain(top, folder_name, folder, folder_tree)
        self._context.counts.directories += 1 + len(folders)
        owner, group = reading.owner_name(os.getuid()), reading.group_name(os.getgid())
        return DiskRoot(top.finish(), folder, owner, group, (), tuple(volumes), has_left_out)

    def _proven(self, number: int, source: DiskSource, left_out: Ranges) -> Hints:
        """Return what may be believed of a disk: all that is said of it, or nothing if some of it turns out wrong.

        left_out: what is free whatever else is said.
        """
        hints = self._said[number].hints.with_free(left_out)
        said = replace(self._said[number], hints=hints.without(Claim.FREE))
        left = sum(end - start for start, end, _ in said.hints.spans)
        if hints.is_trusted or not left:
            return hints
        looked = look(said, source, DISK_CHUNK, self._id_key)
        name, send = shown(source.name), self._context.scanner.send
        if looked.wrong_at is not None:
            send(Remark(
                f"THE MAP {hints.source} IS WRONG: the disk {name} is another at byte {looked.wrong_at:,}; all of the "
                "disk was read, and this image is right. Images that were made by such maps may be wrong: make them "
                "again without, and find out why"
            ))  # fmt: skip
            return Hints().with_free(left_out)
        send(Remark(
            f"by the map {hints.source}, {left / 2**30:,.2f} of {source.size / 2**30:,.2f} GiB of the disk {name} need "
            f"not be read; {looked.count:,} chunks of them, chosen by chance, were, and are as it says"
        ))  # fmt: skip
        return hints

    def _store_disk(self, number: int, source: DiskSource, hints: Hints, meter: "_DataMeter") -> Content:
        if isinstance(source, StoredDisk):
            self._pass_by(source, meter)
            return source.content
        builder = ContentBuilder(self._context.save_tree)
        pending: deque[int | Cuts] = deque()
        hole = 0

        def take() -> None:
            nonlocal hole
            first = pending.popleft()
            for length, chunk_id in self._context.scanner.result_of(first) if isinstance(first, int) else first:
                meter.pass_by(length, is_data=bool(chunk_id))
                if not chunk_id:
                    hole += length
                    continue
                if hole:
                    builder.add([hole, HOLE])
                    hole = 0
                builder.add([length, CHUNK, chunk_id])

        for start in range(0, source.size, _RANGE):
            end = min(start + _RANGE, source.size)
            task = RangeTask(number, start, end, tuple(hints.between(start, end)))
            if self._context.scanner.is_wanted():
                pending.append(self._context.scanner.give(task))
            else:
                pending.append(self.store_range(task))
            while len(pending) > _MOST_PENDING or (pending and isinstance(pending[0], list)):
                take()
        while pending:
            take()
        if hole:
            builder.add([hole, HOLE])
        return builder.finish()

    def store_range(self, task: RangeTask) -> Cuts:
        """Store a part of a disk and return what it is made of. Raises: SourceError."""
        source = self._disks[task.disk]
        counts = self._context.counts
        counts.current = source.path
        cuts: Cuts = []
        for start, end, stands in self._said[task.disk].all_taken(task.said):
            if stands is None:
                self._store_read(source, start, end, cuts)
            else:
                cuts.append((end - start, stands))
        counts.size += task.end - task.start
        self._context.tell_counts()
        return cuts

    def _store_read(self, source: DiskSource, position: int, end: int, cuts: Cuts) -> None:
        # Where holes are is not asked for little: the answer looks far ahead, and costs more than reading.
        while position < end:
            low, high = self._data_at(source, position, end) if end - position > _READ else (position, end)
            if low > position:
                cuts.append((low - position, b""))
            self._store_data(source, low, high, cuts)
            position = high

    def _pass_by(self, source: StoredDisk, meter: "_DataMeter") -> None:
        """Measure a disk that is stored already."""
        at = 0
        for low, high in source.data_ranges(0, source.size):
            meter.pass_by(low - at, is_data=False)
            meter.pass_by(high - low, is_data=True)
            at = high
        meter.pass_by(source.size - at, is_data=False)
        self._context.counts.size += source.size

    def _data_at(self, source: DiskSource, position: int, end: int) -> tuple[int, int]:
        """Return the next range that may hold data, in whole chunks; (end, end) if there is none."""
        for low, high in source.data_ranges(position, end):
            start = max(position, low - low % DISK_CHUNK)
            return start, min(end, -(-high // DISK_CHUNK) * DISK_CHUNK)
        return end, end

    def _store_data(self, source: DiskSource, start: int, end: int, cuts: Cuts) -> None:
        key, data = self._id_key, self._data
        for at in range(start, end, _READ):
            buffer = self._buffer[: min(_READ, end - at)]
            source.read_into(buffer, at)
            for low in range(0, len(buffer), DISK_CHUNK):
                piece = buffer[low : low + DISK_CHUNK]
                if piece[:16] == _ZERO_START[: len(piece)] and piece == _ZEROS[: len(piece)]:
                    cuts.append((len(piece), b""))
                    continue
                chunk_id = ChunkId(blake3(piece, key=key).digest())
                data.save(chunk_id, piece)
                cuts.append((len(piece), chunk_id))


def _hints_of(
    source: DiskSource, hints: Mapping[str, Hints], parent: Snapshot | None, repository: Repository, scanner: Scanner
) -> DiskHints:
    found = hints.get(source.name, Hints()).in_chunks(DISK_CHUNK, source.size)
    volume = volume_before(parent, source.name) if parent is not None else None
    if parent is None or volume is None:
        # Where packs are missing nothing is taken from an image.
        return DiskHints(found.without(Claim.SAME), None)
    load, index = repository.trees.load, repository.data_index
    return DiskHints(found, DiskBefore(parent, volume, load, index, DISK_CHUNK, scanner.distrust))


def _places_of(layout: Layout, disk: int) -> set[int]:
    """Return where the volumes on a disk begin and end."""
    return {
        place
        for volume in range(len(layout.table.disks), len(layout.table))
        for (length, number, start), is_on_disk in layout.counted(volume)
        if is_on_disk and number == disk
        for place in (start, start + length)
    }


class _DataMeter:
    """Counts the bytes that are in no hole between some places of a disk, which passes by in order."""

    def __init__(self, places: set[int]) -> None:
        self._places = sorted(places)
        self._numbers = {place: number for number, place in enumerate(self._places)}
        self._counts: list[int] = []  # of the places that were passed
        self._position = self._data = 0
        self.pass_by(0, is_data=False)

    def pass_by(self, length: int, is_data: bool) -> None:
        """Note what comes next."""
        places, counts = self._places, self._counts
        while len(counts) < len(places) and places[len(counts)] <= self._position + length:
            counts.append(self._data + (places[len(counts)] - self._position if is_data else 0))
        self._position += length
        self._data += length if is_data else 0

    def between(self, start: int, end: int) -> int:
        """Return the bytes of data between two of the places."""
        return self._counts[self._numbers[end]] - self._counts[self._numbers[start]]


def _row(mode: int, size: int, inode: int, time_ns: int) -> bytes:
    times = (time_ns // NANOSECONDS, time_ns % NANOSECONDS) * 2
    return STAT_ROW.pack(mode, os.getuid(), os.getgid(), 1, inode, size, *times)
