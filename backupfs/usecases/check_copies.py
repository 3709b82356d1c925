"""The copies of chunks of one kind, as a check judges them: where the index says they lie, and whether they do.

What is known about packs is collected first (a listing, and with `read_data` their bytes); then each chunk is judged
once and the verdict marked by its position in the index, one bit each. Belongs to one thread at a time.
"""

import logging
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from backupfs.codec.keys import keyed_hash
from backupfs.codec.sealing import HEADER, Kind, OpenedHeader, UnitRole, hash_object
from backupfs.errors import DamagedObject, ObjectMissing, RepositoryError, StoreError
from backupfs.ids import ChunkId, ObjectId, short
from backupfs.repository import layout
from backupfs.repository.chunks import ChunkReader
from backupfs.repository.index import Index
from backupfs.repository.marks import Marks
from backupfs.repository.pack import PackRef, blocks_of, decode_directory
from backupfs.repository.repository import TREE_CACHE_SIZE, Repository
from backupfs.repository.run import Location
from backupfs.stores.together import each
from backupfs.usecases.findings import Findings, Severity

log = logging.getLogger(__name__)

# No writer makes larger packs; one that is larger is not read whole, or it would break the promise of bounded memory.
MOST_PACK_SIZE = 128 << 20

NAMED_ANEW = "the next backup of the host that wrote them, or of any a day later, names them anew"
INDEX_KIND = {Kind.DATA_PACK: Kind.DATA_INDEX, Kind.TREE_PACK: Kind.TREE_INDEX}


@dataclass(frozen=True, slots=True)
class PackRead:
    """What reading one pack whole brought."""

    pack_id: ObjectId
    size: int
    damage: tuple[str, ...]
    verified: "array[int]"  # positions in the index of the chunks whose bytes have their id
    has_directory: bool
    is_garbled: bool  # its bytes are wrong
    failure: StoreError | None = None  # why nothing can be said about it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says about a chunk."""

    position: int | None  # None where no index names it
    good: bool  # a copy of it can be read, or nobody could look
    length: int | None  # None where it is not known


class Unread(Exception):
    """Nobody could look at any good copy that a chunk may have; it is noted why."""


@dataclass(slots=True)
class Unnamed:
    """Packs that lie in the store and in no index."""

    packs: int = 0
    size: int = 0


class Copies:
    """Judges the copies of chunks of one kind."""

    def __init__(self, repository: Repository, kind: Kind, index: Index, findings: Findings) -> None:
        self._store = repository.store
        self._keyring = repository.keyring
        self._id_key = repository.keyring.chunk_id_key(tree=kind == Kind.TREE_PACK)
        self._findings = findings
        self.kind = kind
        self.index = index
        self.reader = ChunkReader(repository.store, repository.keyring, index, kind, TREE_CACHE_SIZE)
        self.done = Marks(index.count)
        self.bad = Marks(index.count)
        self.needed: set[ObjectId] = set()  # packs with chunks that were judged or loaded
        self.unnamed = Unnamed()
        self.named_packs = 0
        self.was_read: Callable[[ObjectId], bool] = lambda _pack_id: False
        self._indexed_rows = index.count  # before packs that no index names were looked into
        self._rebuilt = False
        self._needed_unnamed: set[ObjectId] = set()
        self._missing: set[ObjectId] = set()
        self._sizes: dict[ObjectId, int] = {}  # of packs that are not as long as the index says
        self._verified = Marks()
        self._without_directory: set[ObjectId] = set()
        self.garbled: set[ObjectId] = set()  # packs in which bytes are wrong
        self.unsound: set[ObjectId] = set()  # packs that were read, and of which not all was good
        self.unread: set[ObjectId] = set()  # packs that are there, and that nobody could look into
        self._unlisted = False  # nobody could look for packs that no index names

    def key_of(self, pack_id: ObjectId) -> str:
        """Return the key of a pack."""
        return layout.key_of(self.kind, pack_id)

    def compare_with_listing(self) -> list[tuple[PackRef, int]]:
        """List the packs once and compare with the index; return (pack, size in the store) of those that are there."""
        prefix = layout.prefix_of(self.kind)
        named = self.index.packs()
        self.named_packs = len(named)
        present: list[tuple[PackRef, int]] = []
        doubtful: list[PackRef] = []
        try:
            listed = list(self._store.list(prefix))
            self._findings.succeeded()
            for info in listed:
                identity = layout.id_in_key(info.key)
                ref = named.pop(ObjectId(identity), None) if identity is not None else None
                if ref is None:
                    self.unnamed.packs += 1
                    self.unnamed.size += info.size
                    if identity is not None:
                        present.append((PackRef(ObjectId(identity), info.size, b""), info.size))
                    continue
                if info.size == ref.size:
                    present.append((ref, info.size))
                else:
                    doubtful.append(ref)
        except StoreError as error:
            self._findings.failed(prefix, error, f"the packs cannot be listed: {error}")
            # Reading them shows which are there.
            return [(ref, ref.size) for ref in self.index.packs().values()]
        doubtful += named.values()
        # A listing may be stale, or have been garbled on its way: it proves that something is there, no more.
        for ref, size in zip(doubtful, each(self._store, self._size_in_store, doubtful), strict=True):
            key = self.key_of(ref.pack_id)
            if isinstance(size, StoreError):
                self._fail(ref.pack_id, size)
                continue
            self._findings.succeeded()
            if size is None:
                self._missing.add(ref.pack_id)
                self._findings.damage(key, "it is missing")
                continue
            present.append((ref, size))
            if size != ref.size:
                self._sizes[ref.pack_id] = size
                self._findings.damage(key, f"it has {size} bytes instead of {ref.size}")
        return present

    def _size_in_store(self, ref: PackRef) -> int | StoreError | None:
        """Return how large a pack is, None if it is not there, or why nobody knows; safe in threads."""
        try:
            return self._store.size(self.key_of(ref.pack_id))
        except ObjectMissing:
            return None
        except StoreError as error:
            return error

    def read_pack(self, ref: PackRef, size: int) -> PackRead:
        """Read a pack whole and compare everything in it with its names; safe in threads, changes nothing.

        ref: as the index has it; without a header where no index names the pack.
        """
        read = self._read_pack(ref, size)
        # It may have been garbled on its way, or be missed once by a server that has it.
        return self._read_pack(ref, size) if read.damage and self._store.is_far else read

    def _read_pack(self, ref: PackRef, size: int) -> PackRead:
        key = self.key_of(ref.pack_id)
        verified = array("Q")
        damage: list[str] = []
        if size > MOST_PACK_SIZE:
            return PackRead(ref.pack_id, 0, (f"it has {size} bytes, more than any pack",), verified, False, False)
        try:
            data = self._store.get(key)
            if hash_object(data) != ref.pack_id:
                damage.append("its bytes are not those it is named by")
            header = ref.header or data[: HEADER.size]
            opened = OpenedHeader(header, self.kind, self._keyring, f"the object {key}")
            rows = decode_directory(opened, data)
        except (RepositoryError, ObjectMissing) as error:
            if isinstance(error, ObjectMissing) and not ref.header:
                # A listing may be stale: somebody deleted what no index names.
                return PackRead(ref.pack_id, 0, (), verified, False, False)
            is_garbled = isinstance(error, RepositoryError)
            return PackRead(ref.pack_id, 0, (*damage, _plainly(error, key)), verified, False, is_garbled)
        except StoreError as error:
            return PackRead(ref.pack_id, 0, (), verified, False, False, error)
        view = memoryview(data)
        for span in blocks_of(rows):
            try:
                stored = view[span.offset : span.offset + span.stored_length]
                plain = memoryview(opened.unseal(stored, span.offset, UnitRole.BLOCK))
            except DamagedObject as error:
                damage.append(_plainly(error, key))
                continue
            for chunk_id, offset, length in span.chunks:
                if keyed_hash(self._id_key, plain[offset : offset + length]) != chunk_id:
                    damage.append(f"the block at {span.offset} holds a chunk that is not {short(chunk_id)}")
                    continue
                place = Location(ref, span.offset, span.stored_length, offset, length)
                verified.extend(at for at, location in self.index.locate(chunk_id) if location == place)
        return PackRead(ref.pack_id, len(data), tuple(damage), verified, True, bool(damage))

    def take(self, read: PackRead) -> None:
        """Note what reading a pack brought. Raises: StoreError where the store gives nothing any more."""
        if read.failure is not None:
            self._fail(read.pack_id, read.failure)
            return
        self._findings.succeeded()
        for what in read.damage:
            self._findings.damage(self.key_of(read.pack_id), what)
            self.unsound.add(read.pack_id)
        if read.is_garbled:
            self.garbled.add(read.pack_id)
        for position in read.verified:
            self._verified.add(position)
        if not read.has_directory:
            self._without_directory.add(read.pack_id)

    def judge(self, chunk_id: ChunkId) -> Verdict:
        """Tell whether a chunk can be read, from what is known about its packs; the first time it is marked."""
        first: tuple[int, Location] | None = None
        good = False
        for position, location in self.index.locate(chunk_id):
            if first is None:
                first = position, location
                if position in self.done:
                    return Verdict(position, position not in self.bad, location.length)
            if self._is_good(position, chunk_id, location):
                good = True
                self.needed.add(location.pack.pack_id)
                self._note_unnamed(first[0], location)
                break
        if first is None:
            if self._rebuild():
                return self.judge(chunk_id)
            with suppress(Unread):
                self._lose(chunk_id)
                return Verdict(None, False, 0)
            return Verdict(None, True, None)
        self.mark(first[0], good)
        return Verdict(first[0], good, first[1].length)

    def forget_verdicts(self) -> None:
        """Be as if no chunk had been judged."""
        self.done = Marks(self.index.count)
        self.bad = Marks(self.index.count)

    def mark(self, position: int, good: bool) -> None:
        """Note the verdict on a chunk."""
        self.done.add(position)
        if not good:
            self.bad.add(position)

    def position(self, chunk_id: ChunkId) -> int | None:
        """Return what stands for a chunk in the marks; None where neither an index nor a pack has it.

        Raises: Unread.
        """
        found = next(self.index.locate(chunk_id), None)
        if found is None and self._rebuild():
            found = next(self.index.locate(chunk_id), None)
        if found is None:
            self._lose(chunk_id)
            return None
        return found[0]

    def load(self, chunk_id: ChunkId) -> memoryview | None:
        """Return a chunk's bytes, or None, with the damage of its copies noted.

        Raises: Unread; StoreError where the store gives nothing any more.
        """
        first: int | None = None
        is_unread = False
        for position, location in self.index.locate(chunk_id):
            first = position if first is None else first
            chunk = self._load_at(chunk_id, location)
            if chunk is not None:
                self._note_unnamed(first, location)
                return chunk
            is_unread |= location.pack.pack_id in self.unread
        if is_unread:
            raise Unread
        return None

    def blamed(self, chunk_id: ChunkId) -> list[str]:
        """Return the keys of the objects that should hold a chunk."""
        keys = dict.fromkeys(self.key_of(location.pack.pack_id) for location in self.index.find(chunk_id))
        return list(keys) or [layout.prefix_of(self.kind)]

    def tell_unnamed(self) -> None:
        """Note which packs are in no index: those that snapshots need are damage of the index, the others are fine."""
        for pack_id in self._needed_unnamed:
            self._findings.damage(
                self.key_of(pack_id),
                "no index names it, though snapshots need it: an index object is missing or damaged; "
                "reading goes by the pack's own directory; the next backup of the host that wrote it, or of any a day "
                "later, names it anew once no damaged index object is left",
            )
        others = self.unnamed.packs - len(self._needed_unnamed)
        if others > 0:
            prefix = layout.prefix_of(self.kind)
            text = (
                f"{others} packs are named by no index and needed by no snapshot: an interrupted or a running backup's"
            )
            self._findings.add(Severity.INFORMATION, prefix, text)

    def _is_good(self, position: int, chunk_id: ChunkId, location: Location) -> bool:
        pack = location.pack
        if pack.pack_id in self._missing:
            return False
        size = self._sizes.get(pack.pack_id, pack.size)
        end = location.block_offset + location.block_stored
        if location.block_offset < HEADER.size or end > size:
            if pack.pack_id not in self._sizes:
                self._findings.damage(self.key_of(pack.pack_id), f"the index says that a block ends at {end} of {size}")
            return False
        if pack.pack_id in self.unread:
            return True  # it is there, as long as it should be: no more is known of any that was not read
        if pack.pack_id in self._without_directory:
            return self._load_at(chunk_id, location) is not None or pack.pack_id in self.unread
        if position >= self._indexed_rows:
            # Its pack was read before its directory was asked: nothing is known about its chunks.
            is_good = not self.was_read(pack.pack_id) or self._load_at(chunk_id, location) is not None
            return is_good or pack.pack_id in self.unread
        if position not in self._verified and self.was_read(pack.pack_id):
            self._findings.damage(
                self.key_of(pack.pack_id), f"it does not hold the chunk {short(chunk_id)} where it should"
            )
            return False
        return True

    def _load_at(self, chunk_id: ChunkId, location: Location) -> memoryview | None:
        pack_id = location.pack.pack_id
        key = self.key_of(pack_id)
        if pack_id in self.unread:
            return None
        try:
            chunk = self.reader.load_at(chunk_id, location)
            self._findings.succeeded()
            return chunk
        except ObjectMissing:
            self._findings.damage(key, "it is missing")
        except RepositoryError as error:
            self._findings.damage(key, _plainly(error, key))
            self.garbled.add(pack_id)
        except StoreError as error:
            self._fail(pack_id, error)
        return None

    def _fail(self, pack_id: ObjectId, error: StoreError) -> None:
        """Note that nobody can look into a pack. Raises: StoreError where the store gives nothing any more."""
        self.unread.add(pack_id)
        key = self.key_of(pack_id)
        self._findings.failed(key, error, f"it could not be read: {_plainly(error, key)}")

    def _note_unnamed(self, first: int, location: Location) -> None:
        if first >= self._indexed_rows:
            self._needed_unnamed.add(location.pack.pack_id)

    def _rebuild(self) -> bool:
        """Look into packs that no index names, once; return whether chunks were found."""
        if self._rebuilt:
            return False
        self._rebuilt = True
        try:
            return self.index.rebuild_from_packs()
        except StoreError as error:
            self._unlisted = True
            prefix = layout.prefix_of(self.kind)
            self._findings.failed(prefix, error, f"packs that no index names cannot be read: {error}")
            return False

    def _lose(self, chunk_id: ChunkId) -> None:
        """Note that a chunk is nowhere. Raises: Unread where nobody could look everywhere."""
        if self._unlisted:
            raise Unread
        prefix = layout.prefix_of(self.kind)
        self._findings.damage(prefix, f"the chunk {short(chunk_id)} is in no index and in no pack")


def _plainly(error: BaseException, key: str) -> str:
    """Return an error's text without the name of the object that the finding is about."""
    text = str(error)
    for lead in (f"the object {key} ", f"object {key} "):
        text = text.removeprefix(lead)
    return text
