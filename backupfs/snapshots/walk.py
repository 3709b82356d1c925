"""Going through a snapshot by path and in order. Pure over a function that gives tree chunks."""

import stat
from collections.abc import Callable, Iterator

from backupfs.errors import PathNotFound, shown
from backupfs.ids import ChunkId
from backupfs.snapshots.content import EXTENT
from backupfs.snapshots.node import INCOMPLETE, STAT_ROW, Node
from backupfs.snapshots.snapshot import ROOT_INCOMPLETE, Snapshot
from backupfs.snapshots.tree import find_node, load_xattrs, nodes
from backupfs.snapshots.volumes import DISK

Load = Callable[[ChunkId], bytes | memoryview]


def root_node(snapshot: Snapshot, load: Load) -> Node:
    """Return the node of `/`, which no tree holds."""
    xattrs = snapshot.root_xattrs
    if isinstance(xattrs, bytes):
        xattrs = load_xattrs(xattrs, load)
    seconds, part = divmod(snapshot.time_ns, 10**9)
    row = (stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, seconds, part, seconds, part)
    if snapshot.root_row:
        row = STAT_ROW.unpack(snapshot.root_row)
    flags = INCOMPLETE if snapshot.traits & ROOT_INCOMPLETE else 0
    return Node(b"", *row, snapshot.root, flags, snapshot.root_owner, snapshot.root_group, xattrs)


def find_path(snapshot: Snapshot, path: bytes, load: Load) -> Node:
    """Return the node at an absolute path; symlinks on the way are not followed.

    Raises: PathNotFound, which says how far the path goes; DamagedObject.
    """
    node = root_node(snapshot, load)
    done = b""
    for name in path.split(b"/"):
        if name in (b"", b"."):
            continue
        found = find_node(tree_of(node), name, load) if node.is_directory else None
        if found is None:
            kind = "has no" if node.is_directory else "is not a directory and has no"
            raise PathNotFound(f"{shown(done or b'/')} {kind} {shown(name)} in this snapshot")
        node = found
        done += b"/" + name
    return node


def tree_of(node: Node) -> ChunkId:
    """Return the tree of a directory's node."""
    assert node.is_directory
    assert isinstance(node.content, bytes)
    return ChunkId(node.content)


def walk(node: Node, path: bytes, load: Load) -> Iterator[tuple[bytes, Node]]:
    """Yield (path, node) of everything below a directory, parents first, names in byte order; not the start itself.

    Depth is bounded by memory alone. Raises: DamagedObject at a page that cannot be read.
    """
    stack: list[tuple[bytes, Iterator[Node]]] = [(path.rstrip(b"/"), nodes(tree_of(node), load))]
    while stack:
        above, children = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            continue
        at = above + b"/" + child.name
        yield at, child
        if child.is_directory:
            stack.append((at, nodes(tree_of(child), load)))


def shown_volumes(snapshot: Snapshot, load: Load) -> dict[str, int]:
    """Return the volumes of an image that are files under /volumes, their numbers by name. Raises: DamagedObject."""
    shown = {node.name: node.content for node in nodes(tree_of(find_path(snapshot, b"/volumes", load)), load)}
    found: dict[str, int] = {}
    for number, volume in enumerate(snapshot.volumes):
        content = shown.get(volume.name.encode() + b".raw")
        # What is mapped shows its own content, others one extent of themselves.
        if content in ([[volume.size, EXTENT, number, 0]], volume.content) and volume.kind != DISK:
            found[volume.name] = number
    return found
