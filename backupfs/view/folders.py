"""The directories above the snapshots: which names lead to which snapshot. Pure.

snapshots/TIME        a snapshot's root; a second snapshot in the same second gets -2
latest                the newest one's root again: a link would cost a request for each path that goes through it
hosts/HOST/TIME       → ../../snapshots/TIME       hosts/HOST/latest
tags/TAG/TIME         → ../../snapshots/TIME
ids/ID                → ../snapshots/TIME, or ../images/NAME/TIME
images/NAME/TIME      an image's root; images/NAME/latest → TIME
images/NAME/TIME/.verify/TIME-levelN   what a verification left

All but `ids` and `images` are of files only.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from blake3 import blake3

from backupfs.ids import SHORT_HEX, ChunkId, SnapshotId
from backupfs.snapshots.losses import NO_DOUBTS, Doubts
from backupfs.snapshots.snapshot import IMAGE, Snapshot, time_name
from backupfs.snapshots.verification import Verification

VERIFY_FOLDER = b".verify"
_MOST_NAME, _KEPT_NAME = 255, 200


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link to a snapshot."""

    target: bytes
    time_ns: int


@dataclass(frozen=True, slots=True)
class Root:
    """The root directory of a snapshot, or one that belongs to it."""

    snapshot: Snapshot
    tree: ChunkId
    time_ns: int
    above: "dict[bytes, Folder]" = field(default_factory=dict)  # directories in it that are in no tree


@dataclass(slots=True)
class Folder:
    """A directory of names."""

    children: "dict[bytes, Folder | Link | Root]" = field(default_factory=dict)
    time_ns: int = 0  # of the newest snapshot below it

    def folder(self, name: bytes) -> "Folder":
        """Return the folder below, made when it is missing."""
        found = self.children.setdefault(name, Folder())
        assert isinstance(found, Folder)
        return found

    def add(self, name: bytes, entry: Link | Root, time_ns: int) -> None:
        """Add an entry that is not a folder."""
        self.children[name] = entry
        self.time_ns = max(self.time_ns, time_ns)


Entry = Folder | Link | Root


def name_snapshots(snapshots: Iterable[Snapshot], names: dict[SnapshotId, bytes]) -> dict[SnapshotId, bytes]:
    """Return a name for each snapshot, oldest first; those that have one keep it.

    names: what was given before, also to snapshots that are gone: a name never passes to another snapshot.
    """
    named = dict(names)
    taken = set(named.values())
    for snapshot in snapshots:
        if snapshot.snapshot_id in named:
            continue
        plain = name = snapshot.time_name.encode()
        count = 1
        while name in taken:
            count += 1
            name = b"%s-%d" % (plain, count)
        taken.add(name)
        named[snapshot.snapshot_id] = name
    return named


def arrange(
    snapshots: Collection[Snapshot],
    names: dict[SnapshotId, bytes],
    verifications: Callable[[SnapshotId], Iterable[Verification]],
    doubts: Doubts = NO_DOUBTS,
) -> Folder:
    """Return the top directory over the snapshots shown, which come oldest first.

    verifications: gives those of a snapshot, oldest first. doubts: what may be later than what is shown: nothing is
    shown as the latest then.
    """
    top = Folder()
    folders = {name: top.folder(name) for name in (b"snapshots", b"hosts", b"tags", b"ids")}
    for snapshot in snapshots:
        time_ns, name = snapshot.time_ns, names[snapshot.snapshot_id]
        if snapshot.kind == IMAGE:
            image = safe_name(snapshot.image)
            folder = top.folder(b"images").folder(image)
            above = {VERIFY_FOLDER: _verify_folder(snapshot, verifications(snapshot.snapshot_id))}
            folder.add(name, Root(snapshot, snapshot.root, time_ns, above), time_ns)
            folder.add(b"latest", Link(name, time_ns), time_ns)
            nearby = Link(b"../images/" + image + b"/" + name, time_ns)
            folders[b"ids"].add(_free_id(folders[b"ids"], snapshot.snapshot_id), nearby, time_ns)
            continue
        folders[b"snapshots"].add(name, Root(snapshot, snapshot.root, time_ns), time_ns)
        nearby, far = Link(b"../snapshots/" + name, time_ns), Link(b"../../snapshots/" + name, time_ns)
        host = folders[b"hosts"].folder(safe_name(snapshot.host))
        host.add(name, far, time_ns)
        host.add(b"latest", far, time_ns)
        for tag in snapshot.tags:
            folders[b"tags"].folder(safe_name(tag)).add(name, far, time_ns)
        folders[b"ids"].add(_free_id(folders[b"ids"], snapshot.snapshot_id), nearby, time_ns)
        top.add(b"latest", Root(snapshot, snapshot.root, time_ns), time_ns)
    files = [snapshot for snapshot in snapshots if snapshot.kind != IMAGE]
    if doubts.about(files, of_any_machine=True):
        top.children.pop(b"latest", None)
    alike: dict[tuple[bytes, bytes], list[Snapshot]] = {}
    for snapshot in snapshots:
        of_image = snapshot.kind == IMAGE
        place = (b"images", safe_name(snapshot.image)) if of_image else (b"hosts", safe_name(snapshot.host))
        alike.setdefault(place, []).append(snapshot)
    for (kind, name), fitting in alike.items():
        if doubts.about(fitting):
            top.folder(kind).folder(name).children.pop(b"latest", None)
    for folder in folders.values():
        folder.time_ns = top.time_ns
    return top


def _verify_folder(snapshot: Snapshot, verifications: Iterable[Verification]) -> Folder:
    folder = Folder(time_ns=snapshot.time_ns)
    for made in verifications:
        if made.tree:
            plain = name = f"{time_name(made.time_ns)}-level{made.level}".encode()
            count = 1
            while name in folder.children:
                count += 1
                name = b"%s-%d" % (plain, count)
            folder.add(name, Root(snapshot, ChunkId(made.tree), made.time_ns), made.time_ns)
    return folder


def _free_id(folder: Folder, snapshot_id: SnapshotId) -> bytes:
    digits = snapshot_id.hex().encode()
    length = SHORT_HEX
    while digits[:length] in folder.children and length < len(digits):
        length += SHORT_HEX
    return digits[:length]


def safe_name(text: str) -> bytes:
    """Return a host's name or a tag as a file name: what a name cannot hold is percent-encoded."""
    if text in ("", ".", ".."):
        return b"%2E" * len(text) or b"%"
    plain = text.encode("utf-8", "surrogateescape")
    name = plain.replace(b"%", b"%25").replace(b"/", b"%2F").replace(b"\0", b"%00")
    if len(name) > _MOST_NAME:
        # One that the kernel refuses would hide those after it.
        return name[:_KEPT_NAME] + b"%" + blake3(plain).hexdigest(length=8).encode()
    return name
