"""Trees that are declared, built and compared, and small repositories to put them into.

    build({"a": File(b"x", mode=0o600), "d": {"l": Symlink(b"../a"), "h": Hardlink("a")}}, path)

`snapshot_of` is the comparable view of a tree on disk, `contents_of` that of a snapshot in a repository. Repositories
have tiny chunks, blocks and packs, so that little data makes many objects.
"""

import hashlib
import os
import random
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from backupfs.chunking.cutter import CutSizes
from backupfs.codec.keys import KdfCost
from backupfs.errors import DamagedObject
from backupfs.ids import ChunkId
from backupfs.localfs.reading import data_ranges
from backupfs.repository.local import LocalFolders
from backupfs.repository.repository import Repository, create_repository, open_repository
from backupfs.repository.writer import WriteSizes
from backupfs.snapshots.content import CHUNK, HOLE, pieces
from backupfs.snapshots.listing import load_snapshots
from backupfs.snapshots.node import Node, Xattrs
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.tree import nodes
from backupfs.snapshots.walk import tree_of
from backupfs.stores.memory import MemoryStore
from backupfs.stores.store import Store
from backupfs.usecases.backup import BackupOptions, BackupResult, backup
from backupfs.usecases.check import CheckOptions, CheckResult, check
from backupfs.usecases.events import ignore

# Trees.


def noise(seed: int, size: int) -> bytes:
    """Return bytes that no codec makes smaller, the same for the same seed."""
    return random.Random(seed).randbytes(size)


OLD_NS = 1_500_000_000_123_456_789  # the time of what is built, so that two builds are equal


@dataclass(frozen=True)
class File:
    """A regular file."""

    content: bytes = b""
    mode: int = 0o644
    mtime_ns: int = OLD_NS
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    owner: tuple[int, int] | None = None  # needs root


@dataclass(frozen=True)
class Sparse:
    """A file with holes: what stands at which offset."""

    size: int
    data: Mapping[int, bytes] = field(default_factory=dict)
    mode: int = 0o644
    mtime_ns: int = OLD_NS


@dataclass(frozen=True)
class Symlink:
    """A symbolic link."""

    target: bytes
    mtime_ns: int = OLD_NS


@dataclass(frozen=True)
class Hardlink:
    """Another name of a file of the same tree, given by its path from the top."""

    to: str | bytes


@dataclass(frozen=True)
class Special:
    """A fifo, a socket or a device (which needs root)."""

    kind: int = stat.S_IFIFO
    mode: int = 0o644
    device: tuple[int, int] = (0, 0)
    mtime_ns: int = OLD_NS


@dataclass(frozen=True)
class Directory:
    """A directory with more than its entries to say; a plain mapping is a directory too."""

    entries: "Tree" = field(default_factory=dict)
    mode: int = 0o755
    mtime_ns: int = OLD_NS
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


Entry = File | Sparse | Symlink | Hardlink | Special | Directory | Mapping[str, "Entry"]
Tree = Mapping[str, Entry] | Mapping[bytes, Entry] | Mapping[str | bytes, Entry]


def build(tree: Tree, path: str | bytes | Path) -> bytes:
    """Make a declared tree at a path, which may exist as an empty directory, and return the path."""
    top = os.fsencode(path)
    links: list[tuple[bytes, bytes]] = []
    _build_directory(Directory(tree), top, links)
    for link, target in links:
        above = os.stat(os.path.dirname(link))
        os.link(os.path.join(top, target), link, follow_symlinks=False)
        os.utime(os.path.dirname(link), ns=(above.st_mtime_ns, above.st_mtime_ns))
    return top


def _build_directory(directory: Directory, path: bytes, links: list[tuple[bytes, bytes]]) -> None:
    os.makedirs(path, exist_ok=True)
    for name, entry in directory.entries.items():
        _build_entry(entry, os.path.join(path, os.fsencode(name)), links)
    _set_xattrs(path, directory.xattrs)
    os.chmod(path, directory.mode)
    os.utime(path, ns=(directory.mtime_ns, directory.mtime_ns))


def _build_entry(entry: Entry, path: bytes, links: list[tuple[bytes, bytes]]) -> None:
    match entry:
        case File(content):
            Path(os.fsdecode(path)).write_bytes(content)
            _set_xattrs(path, entry.xattrs)
            if entry.owner is not None:
                os.chown(path, *entry.owner)
            os.chmod(path, entry.mode)
        case Sparse(size, data):
            with open(path, "wb") as file:
                file.truncate(size)
                for offset, content in data.items():
                    os.pwrite(file.fileno(), content, offset)
            os.chmod(path, entry.mode)
        case Symlink(target):
            os.symlink(target, path)
        case Special(kind, mode, device):
            if kind == stat.S_IFSOCK:
                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(path)
            else:
                os.mknod(path, kind, os.makedev(*device))
            os.chmod(path, mode)
        case Hardlink(to):
            links.append((path, os.fsencode(to)))
            return
        case Directory():
            _build_directory(entry, path, links)
            return
        case _:
            _build_directory(Directory(entry), path, links)
            return
    os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _set_xattrs(path: bytes, xattrs: Mapping[str, bytes]) -> None:
    for name, value in xattrs.items():
        os.setxattr(path, name, value)


@dataclass(frozen=True)
class Seen:
    """One entry of a tree on disk, with everything that a backup should bring back."""

    kind: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    size: int  # 0 for directories
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Xattrs = ()
    links: tuple[bytes, ...] = ()  # the paths of all names of a hardlinked file
    content: str = ""  # hash
    data: tuple[tuple[int, int], ...] = ()  # where a file is not a hole


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def snapshot_of(path: str | bytes | Path, *, holes: bool = True, xattrs: bool = True) -> dict[bytes, Seen]:
    """Return what stands at and below a path, by path from there (b"" is the top), fit for `==`.

    holes: whether to say where files have data; not every file system can tell.
    """
    top = os.fsencode(path)
    found: dict[bytes, Seen] = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    pending = [b""]
    while pending:
        relative = pending.pop()
        full = os.path.join(top, relative) if relative else top
        status = os.lstat(full)
        if stat.S_ISDIR(status.st_mode):
            pending += [os.path.join(relative, name) for name in os.listdir(full)]
        elif status.st_nlink > 1:
            groups.setdefault((status.st_dev, status.st_ino), []).append(relative)
        found[relative] = _seen(full, status, holes, xattrs)
    for names in groups.values():
        for name in names:
            found[name] = replace(found[name], links=tuple(sorted(names)))
    return dict(sorted(found.items()))


def _seen(full: bytes, status: os.stat_result, holes: bool, xattrs: bool) -> Seen:
    is_file = stat.S_ISREG(status.st_mode)
    is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    names = sorted(os.listxattr(full, follow_symlinks=False)) if xattrs else []
    content, data = "", []
    if is_file:
        with open(full, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            data = list(data_ranges(file.fileno(), status.st_size)) if holes else []
    return Seen(
        _KINDS[stat.S_IFMT(status.st_mode)],
        stat.S_IMODE(status.st_mode),
        (status.st_uid, status.st_gid),
        status.st_mtime_ns,
        0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        os.readlink(full) if stat.S_ISLNK(status.st_mode) else b"",
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        tuple((os.fsencode(name), os.getxattr(full, name, follow_symlinks=False)) for name in names),
        content=content,
        data=tuple(data),
    )


# Repositories.

PASSWORD = b"correct horse"
CHEAP = KdfCost(memory_kib=64, passes=1, lanes=1)
CUT_SIZES = CutSizes(1 << 10, 4 << 10, 16 << 10)
SMALL = WriteSizes(block=8 << 10, pack=32 << 10, checkpoint_packs=2)
NOWHERE = LocalFolders(None, None)


def folders_in(path: Path) -> LocalFolders:
    """Return local folders below a path."""
    return LocalFolders(path / "cache", path / "state")


def new_repository(store: Store | None = None, folders: LocalFolders = NOWHERE) -> Repository:
    """Return a new repository, in memory unless a store is given."""
    return create_repository(store or MemoryStore(), PASSWORD, "first", CHEAP, CUT_SIZES, folders)


def reopened(source: Repository | Store, folders: LocalFolders | None = None) -> Repository:
    """Return the repository as another process would open it, indexes loaded."""
    store = source.store if isinstance(source, Repository) else source
    known = source.local if isinstance(source, Repository) else NOWHERE
    repository = open_repository(store, PASSWORD, folders or known)
    repository.load_indexes()
    return repository


def small_options(**options: object) -> BackupOptions:
    """Return options that make small packs."""
    return BackupOptions(sizes=SMALL, **options)  # type: ignore[arg-type]


def run_backup(repository: Repository, *paths: str | bytes | Path, **options: object) -> BackupResult:
    """Back up in small packs and return the whole result."""
    names = [os.fsencode(path) for path in paths]
    return backup(repository, names, small_options(**options), ignore)


def back_up(repository: Repository, *paths: str | bytes | Path, **options: object) -> Snapshot:
    """Back up in small packs and return the snapshot."""
    snapshot = run_backup(repository, *paths, **options).snapshot
    assert snapshot is not None
    return snapshot


def run_check(repository: Repository, **options: object) -> CheckResult:
    """Check a repository."""
    return trio.run(partial(check, repository, CheckOptions(**options), ignore))  # type: ignore[arg-type]


def copy_of(store: Store) -> MemoryStore:
    """Return a store in memory with the same objects, to be damaged."""
    copy = MemoryStore()
    for info in store.list(""):
        copy.put(info.key, store.get(info.key))
    return copy


def keys_of(store: Store, prefix: str = "") -> list[str]:
    """Return the keys of a store's objects."""
    return [info.key for info in store.list(prefix)]


@dataclass(frozen=True)
class Kept:
    """One entry of a snapshot, read back; `content` is None where it is damaged."""

    node: Node
    content: bytes | None = b""


def contents_of(repository: Repository, snapshot: Snapshot) -> dict[bytes, Kept | None]:
    """Return everything in a snapshot, by absolute path; `DIRECTORY/?` is None where some of its pages are damaged.

    Raises: whatever reading raises that is not DamagedObject.
    """
    found: dict[bytes, Kept | None] = {}
    _read_below(repository, snapshot.root, b"", found)
    return found


def _read_below(repository: Repository, tree: ChunkId, path: bytes, found: dict[bytes, Kept | None]) -> None:
    try:
        for node in nodes(tree, repository.trees.load):
            at = path + b"/" + node.name
            found[at] = Kept(node, content_of(repository, node))
            if node.is_directory:
                _read_below(repository, tree_of(node), at, found)
    except DamagedObject:
        found[path + b"/?"] = None


def content_of(repository: Repository, node: Node) -> bytes | None:
    """Return a file's bytes (of others what the node keeps), or None where they are damaged."""
    if not node.is_file:
        return node.content if isinstance(node.content, bytes) else b""
    parts: list[bytes] = []
    try:
        for piece in pieces(node.content, node.size, 0, node.size, repository.trees.load):
            source: bytes | memoryview = piece.source
            if piece.kind == CHUNK:
                source = repository.data.load(ChunkId(piece.source))
            elif piece.kind == HOLE:
                source = bytes(piece.offset + piece.length)
            parts.append(bytes(source[piece.offset : piece.offset + piece.length]))
    except DamagedObject:
        return None
    return b"".join(parts)


def all_contents(repository: Repository) -> dict[bytes, dict[bytes, Kept | None]]:
    """Return what every readable snapshot holds: snapshot id → path → entry."""
    return {
        snapshot.snapshot_id: contents_of(repository, snapshot) for snapshot in load_snapshots(repository).snapshots
    }
