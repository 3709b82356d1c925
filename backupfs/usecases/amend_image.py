"""Put or remove single files of an image: on a scratch copy, by tools that know its file system; then as every edit."""

import os
import stat
import tempfile
from collections.abc import Callable

from backupfs.disks.editors import Editor, open_editor
from backupfs.errors import PathNotFound, SourceError, UsageError, shown
from backupfs.repository.repository import Repository
from backupfs.snapshots.node import Node
from backupfs.snapshots.snapshot import Snapshot
from backupfs.snapshots.volumes import shared_volumes
from backupfs.snapshots.walk import Load, find_path, walk
from backupfs.usecases.edit import EditOptions, commit_edit
from backupfs.usecases.events import Report
from backupfs.usecases.scratch import scratch_mount
from backupfs.usecases.storing import BackupResult


def put_in_image(
    repository: Repository, snapshot: Snapshot, path: bytes, local: bytes, makes_parents: bool, options: EditOptions,
    report: Report,
) -> BackupResult:  # fmt: skip
    """Make a child in which a file, folder or link of this machine stands at /files/VOLUME/PATH.

    It forks; indexes must be loaded. Raises: PathNotFound; UsageError; SourceError; MountError; StoreError.
    """
    load = repository.trees.load
    volume, inner = _split(path)
    found = _find(snapshot, path, load)
    parents: list[bytes] = []
    if found is None:
        above = inner.rpartition(b"/")[0]
        while above and _find(snapshot, b"/files/" + volume.encode() + above, load) is None:
            parents.insert(0, above)
            above = above.rpartition(b"/")[0]
        if parents and not makes_parents:
            raise PathNotFound(f"{shown(volume)} has no {shown(parents[0])}: --parents makes what is missing")
    is_directory = os.path.isdir(local) and not os.path.islink(local)
    if found is not None and found.is_directory != is_directory:
        kinds = ("a folder", "none") if found.is_directory else ("no folder", "one")
        raise UsageError(
            f"{shown(path)} is {kinds[0]} in the image and {shown(local)} is {kinds[1]}: name another PATH, or remove "
            "that one first"
        )

    def change(editor: Editor) -> None:
        if found is not None:
            _remove(editor, inner, found, load)
        with tempfile.TemporaryDirectory(prefix="backupfs-put-") as new:
            os.chmod(new, 0o755)
            for parent in parents:
                editor.put(parent, os.fsencode(new))
        _put(editor, inner, local)

    return _changed(repository, snapshot, volume, change, options, report)


def remove_from_image(
    repository: Repository, snapshot: Snapshot, paths: list[bytes], recursive: bool, options: EditOptions,
    report: Report,
) -> BackupResult:  # fmt: skip
    """Make a child in which some paths, all of one volume, are not; else as `put_in_image`."""
    load = repository.trees.load
    nodes: dict[bytes, Node] = {}
    volumes = {_split(path)[0] for path in paths}
    if len(volumes) > 1:
        raise UsageError("the paths are of several volumes: change one at a time")
    for path in paths:
        node = find_path(snapshot, path, load)
        if node.is_directory and not recursive:
            raise UsageError(f"{shown(path)} is a folder: -R removes it with all that is in it")
        # What is below another one goes with it.
        if not any(path.startswith(other + b"/") for other in paths):
            nodes[_split(path)[1]] = node

    def change(editor: Editor) -> None:
        for inner, node in nodes.items():
            _remove(editor, inner, node, load)

    return _changed(repository, snapshot, volumes.pop(), change, options, report)


def _changed(
    repository: Repository,
    snapshot: Snapshot,
    volume: str,
    change: Callable[[Editor], None],
    options: EditOptions,
    report: Report,
) -> BackupResult:
    number = next(number for number, one in enumerate(snapshot.volumes) if one.name == volume)
    if number in shared_volumes(snapshot.volumes):
        raise UsageError(
            f"{shown(volume)} is mirrored or lies in a thin pool: what is written to it would be in one copy only, or "
            "in other volumes, too. Restore the disks, and change it there"
        )
    with scratch_mount(repository, snapshot, is_edit=True) as scratch:
        change(open_editor(scratch.volume(volume), snapshot.volumes[number].size))
        return commit_edit(repository, snapshot, scratch, options, report)


def _split(path: bytes) -> tuple[str, bytes]:
    """Return the volume and the path in it of /files/VOLUME/PATH. Raises: UsageError."""
    match path.split(b"/", 3):
        case [b"", b"files", volume, inner] if inner:
            return os.fsdecode(volume), b"/" + inner
    raise UsageError(f"{shown(path)}: in an image only what is below /files/VOLUME can be changed")


def _find(snapshot: Snapshot, path: bytes, load: Load) -> Node | None:
    try:
        return find_path(snapshot, path, load)
    except PathNotFound:
        find_path(snapshot, b"/".join(path.split(b"/")[:3]), load)  # the volume itself must be there
        return None


def _remove(editor: Editor, inner: bytes, node: Node, load: Load) -> None:
    """Remove an entry, and first what is in it."""
    below = [(path, child.mode) for path, child in walk(node, inner, load)] if node.is_directory else []
    for path, mode in reversed(below):
        editor.remove(path, mode)
    editor.remove(inner, node.mode)


def _put(editor: Editor, inner: bytes, local: bytes) -> None:
    """Put an entry, and then what is in it."""
    editor.put(inner, local)
    try:
        if not stat.S_ISDIR(os.lstat(local).st_mode):
            return
        names = sorted(os.listdir(local))
    except OSError as error:
        raise SourceError(f"{shown(local)} cannot be read: {error.strerror}") from error
    for name in names:
        _put(editor, inner + b"/" + name, os.path.join(local, name))
