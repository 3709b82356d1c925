"""Single files of images: what is refused before anything is copied."""

import os
from pathlib import Path

import pytest

from backupfs.errors import UsageError
from backupfs.usecases.amend_image import put_in_image, remove_from_image
from backupfs.usecases.edit import EditOptions
from tests.builders import ignore, new_repository
from tests.disks.test_logical import MIB, Group, file_system
from tests.usecases.test_image import make_image


def test_files_of_volumes_that_share_their_bytes_are_not_changed(tmp_path: Path) -> None:
    """A write to a block of a thin pool would be in all snapshots of the volume, one to a mirror in one copy."""
    group = Group(tmp_path)
    (tmp_path / "fs").mkdir()
    group.store_in_thin(1, file_system(tmp_path / "fs", "ext4", 16 * MIB, 20), list(range(190, -1, -1)))
    repository = new_repository()
    snapshot = make_image(repository, *group.save(), name="shared")
    local = tmp_path / "local"
    local.write_bytes(b"new")
    options = EditOptions()
    with pytest.raises(UsageError, match="mixed-thin is mirrored or lies in a thin pool"):
        put_in_image(repository, snapshot, b"/files/mixed-thin/new", os.fsencode(local), False, options, ignore)
    with pytest.raises(UsageError, match="mixed-thin is mirrored or lies in a thin pool"):
        remove_from_image(repository, snapshot, [b"/files/mixed-thin/lost+found"], True, options, ignore)
    for path in (b"/files/mixed-thin", b"/files", b"/disks/a.raw", b"/files/mixed-thin/"):
        with pytest.raises(UsageError, match="only what is below /files/VOLUME can be changed"):
            put_in_image(repository, snapshot, path, os.fsencode(local), False, options, ignore)
