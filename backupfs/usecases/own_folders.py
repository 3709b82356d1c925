"""Keep what is written for a user out of the folders that are backupfs's own: the repository, the cache, the state."""

import os
from collections.abc import Sequence

from backupfs.errors import UsageError, shown
from backupfs.localfs.selection import identities


def require_elsewhere(target: bytes, own_folders: Sequence[bytes]) -> None:
    """Refuse a target that is one of these folders or lies in one, by whatever way it is named.

    Raises: UsageError.
    """
    own = identities(own_folders)
    place = os.path.realpath(target)
    while True:
        # By identity: a folder may be mounted at a second place.
        if identities([place]) & own:
            raise UsageError(
                f"{shown(target)} lies in {shown(place)}, which is backupfs's own (the repository, its cache or its "
                "state): name another target; nothing was written"
            )
        above = os.path.dirname(place)
        if above == place:
            return
        place = above
