"""A spool gives back what it was given, or nothing."""

import os
import random
from pathlib import Path

import pytest

from backupfs.stores import spool as spool_module
from backupfs.stores.spool import Spool


def test_what_is_kept_is_given_back_and_the_oldest_goes(tmp_path: Path) -> None:
    chooser = random.Random(4)
    spool = Spool(tmp_path, 10_000)
    contents: dict[str, bytes] = {}
    for number in range(3000):
        name = str(chooser.randrange(number + 1)) if chooser.random() < 0.1 else str(number)
        contents[name] = chooser.randbytes(chooser.randrange(1, 1500))
        spool.keep(name, contents[name])
        assert spool.read(name) == contents[name]
        found = [name for name, content in contents.items() if spool.read(name) is not None]
        assert all(spool.read(name) == contents[name] for name in found)
        # What is newest is there, as far as there is room for it.
        assert sum(len(contents[name]) for name in found) > 7000 or number < 20
    assert os.listdir(tmp_path) == []
    spool.close()
    assert spool.read(name) is None
    spool.keep("a", b"1")
    assert spool.read("a") is None


def test_what_is_too_large_is_not_kept() -> None:
    spool = Spool(None, 100)
    spool.keep("a", bytes(101))
    spool.keep("b", bytes(100))
    assert (spool.read("a"), spool.read("b")) == (None, bytes(100))
    spool.close()


def test_a_full_disk_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module.tempfile, "TemporaryFile", full)
    spool = Spool(tmp_path, 100)
    spool.keep("a", b"1")
    assert spool.read("a") is None
    spool.keep("b", b"1")
    spool.close()


def test_a_folder_that_is_none_is_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "nosuch", 100)
    spool.keep("a", b"1")
    assert spool.read("a") == b"1"
    spool.close()
