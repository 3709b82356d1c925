"""Exports that do not come to their end: what they leave, and what the next one removes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs.errors import SourceError
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases.events import Event
from backupfs.usecases.export import export
from backupfs.usecases.restore_image import restore_image
from tests.builders import ignore, new_repository, reopened
from tests.usecases.test_image import MIB, disk_in, make_image

Imaged = tuple[Repository, Snapshot, Path]


@pytest.fixture
def imaged(tmp_path: Path) -> Imaged:
    path = disk_in(tmp_path / "disk.raw", size=30 * MIB, table=b"label: gpt\nsize=5M\n")
    repository = new_repository()
    snapshot = make_image(repository, path)
    return reopened(repository), snapshot, path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with less space than the disk takes."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_where_there_is_no_space_nothing_is_left_of_an_export(form: str, imaged: Imaged, small: Path) -> None:
    repository, snapshot, _ = imaged
    with pytest.raises(SourceError) as caught:
        export(repository, snapshot, "", os.fsencode(small / "out"), form, ignore)
    assert str(caught.value).startswith(f"{small / 'out'} cannot be written at byte ")
    assert str(caught.value).endswith(": No space left on device")
    assert list(small.iterdir()) == []


def test_where_there_is_no_space_for_a_disk_the_message_says_how_to_go_on(imaged: Imaged, small: Path) -> None:
    repository, snapshot, path = imaged
    target = small / "out"
    with pytest.raises(SourceError, match="No space left on device: it is not whole, and the same command goes on"):
        restore_image(repository, snapshot, "", os.fsencode(target), False, ignore)
    subprocess.run(["mount", "-o", "remount,size=60M", small], check=True)
    restore_image(repository, snapshot, "", os.fsencode(target), False, ignore)
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_export_that_is_interrupted_leaves_nothing(form: str, imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, _ = imaged
    (tmp_path / "folder").mkdir()

    def interrupt(_event: Event) -> None:
        # Not under the name that it will have.
        assert not (tmp_path / "folder" / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(repository, snapshot, "", os.fsencode(tmp_path / "folder" / "out"), form, interrupt)
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_a_killed_export_left_the_next_one_removes(imaged: Imaged, tmp_path: Path) -> None:
    repository, snapshot, path = imaged
    folder = tmp_path / "folder"
    folder.mkdir()
    script = (
        "import os, sys, time\nfrom backupfs.usecases.export import _work_folder\n"
        "with _work_folder(os.fsencode(sys.argv[1])) as (work, _):\n"
        "    open(os.path.join(work, b'raw'), 'wb').write(b'part')\n    print(flush=True)\n    time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    [work] = folder.iterdir()
    export(repository, snapshot, "", os.fsencode(folder / "one"), "raw", ignore)
    assert sorted(folder.iterdir()) == [work, folder / "one"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (work / "raw").read_bytes() == b"part"
    export(repository, snapshot, "", os.fsencode(folder / "two"), "raw", ignore)
    assert sorted(folder.iterdir()) == [folder / "one", folder / "two"]
    assert (folder / "two").read_bytes() == path.read_bytes()
