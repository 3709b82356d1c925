"""The table of volumes of an image: what was found on its disks, as the snapshot keeps it."""

from collections.abc import Callable

from backupfs.disks.filesystem import Unreadable
from backupfs.disks.table import Decrypted, LaidOut
from backupfs.errors import SourceError, shown
from backupfs.ids import ChunkId
from backupfs.snapshots.content import EXTENT, HOLE, ContentBuilder
from backupfs.snapshots.volumes import CRYPT, MAPPED, RANGES, STRIPES, Ranges, Stripes, Volume


def recorded(laid: LaidOut, data_size: int, save: Callable[[bytes], ChunkId]) -> Volume:
    """Return a volume as it is kept.

    data_size: its bytes in no hole. save: stores a list page, where a volume is in more ranges than a record can take.
    Raises: SourceError.
    """
    made_of = laid.made_of
    if isinstance(made_of, Ranges):
        return Volume(laid.name, RANGES, laid.size, data_size, b"", made_of.ranges)
    if isinstance(made_of, Stripes):
        return Volume(laid.name, STRIPES, laid.size, data_size, b"", made_of.legs, made_of.stripe)
    if isinstance(made_of, Decrypted):
        return Volume(laid.name, CRYPT, laid.size, data_size, b"", (made_of.place,), 0, made_of.cipher)
    builder = ContentBuilder(save)
    try:
        for length, base, start in made_of.parts(0, laid.size):
            builder.add([length, HOLE] if base < 0 else [length, EXTENT, base, start])
    except Unreadable as error:
        # It was gone through before, and was sound.
        raise SourceError(f"the volume {shown(laid.name)} changed while it was read: {error}") from error
    return Volume(laid.name, MAPPED, laid.size, data_size, builder.finish())
