"""What a later look into an image found, as the arguments of a note: another root with the files, and its volumes.

Arguments: [[tree, stat row, owner, group, xattrs] of `/`, traits, volumes, [files, directories, files skipped]].
The table of volumes begins anew, but the disks in it must be those of the snapshot.
Pure. Source: docs/format.rst, "Indexes of images".
"""

from collections.abc import Sequence
from dataclasses import replace

from backupfs.codec.records import Field
from backupfs.errors import DamagedObject
from backupfs.ids import ID_SIZE, ChunkId
from backupfs.snapshots.node import Xattrs
from backupfs.snapshots.snapshot import IMAGE, Snapshot, is_directory_row
from backupfs.snapshots.tree import decode_xattrs
from backupfs.snapshots.volumes import decode_volumes, encode_volume


def encode_index(snapshot: Snapshot) -> tuple[Field, ...]:
    """Return the arguments of a note that makes an image show what this form of it does."""
    xattrs = snapshot.root_xattrs
    kept: Field = xattrs if isinstance(xattrs, bytes) else [list(pair) for pair in xattrs]
    statistics = snapshot.statistics
    return (
        [snapshot.root, snapshot.root_row, snapshot.root_owner, snapshot.root_group, kept],
        snapshot.traits,
        [encode_volume(volume) for volume in snapshot.volumes],
        [statistics.files, statistics.directories, statistics.files_skipped],
    )


def indexed(snapshot: Snapshot, arguments: Sequence[Field], what: str) -> Snapshot:
    """Return an image as a note has it shown.

    what: the note, for messages.
    Raises: DamagedObject for arguments that are none, or that would change what a disk holds.
    """
    match arguments:
        case [
            [bytes(root), bytes(row), bytes(owner), bytes(group), xattrs, *_],
            int(traits),
            list(records),
            [int(files), int(directories), int(files_skipped), *_],
            *_,
        ] if snapshot.kind == IMAGE and len(root) == ID_SIZE and is_directory_row(row):
            volumes = decode_volumes(records, what)
            disks = [disk.volume for disk in snapshot.disks]
            if any(volumes[number : number + 1] != snapshot.volumes[number : number + 1] for number in disks):
                raise DamagedObject(f"{what} is not valid: it speaks of other disks than those of the image")
            return replace(
                snapshot,
                root=ChunkId(root),
                root_row=row,
                root_owner=owner,
                root_group=group,
                root_xattrs=_xattrs_of(xattrs, what),
                traits=snapshot.traits | traits,
                volumes=volumes,
                statistics=replace(
                    snapshot.statistics, files=files, directories=directories, files_skipped=files_skipped
                ),
            )
    raise DamagedObject(f"{what} is damaged: it is no index of an image")


def _xattrs_of(field: Field, what: str) -> Xattrs | bytes:
    try:
        return decode_xattrs(field)
    except DamagedObject as error:
        raise DamagedObject(f"{what} is damaged: {error}") from error
