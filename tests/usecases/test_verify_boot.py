"""Which bus a machine that verifies an image has its disks on, and when another one is tried."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from backupfs.disks.machine import MachineDisk, MachineOptions
from backupfs.errors import StoreError, StoreUnavailable
from backupfs.snapshots.verification import BOOT, Outcome, Result
from backupfs.usecases import verify as verify_module
from backupfs.usecases.boot_watch import Watched
from backupfs.usecases.mount import Unread
from backupfs.usecases.verify import VerifyOptions
from tests.builders import ignore, new_repository
from tests.usecases.test_image import MIB, disk_in, make_image


class Machine:
    """Stands for a machine of which only the bus is of interest."""

    firmware, accelerator = "bios", "tcg"
    started: list[str]

    def __init__(self, disks: list[MachineDisk], options: MachineOptions, folder: Path) -> None:
        del disks, folder
        self.started.append(options.bus)
        self.bus = options.bus

    def end(self) -> None:
        return


def booted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: str, bus: str = "auto", timeout_s: float = 900
) -> tuple[Outcome, list[str]]:
    """Boot an image of a disk sda that comes up on one bus only; return what is said, and the buses."""
    repository = new_repository()
    snapshot = make_image(repository, disk_in(tmp_path / "sda", size=3 * MIB, table=b"label: dos\n"))
    Machine.started = []
    scratches = []

    @contextlib.contextmanager
    def scratch_mount(*_: object) -> Iterator[SimpleNamespace]:
        scratches.append(None)
        unread = Unread(tmp_path / "unread")
        yield SimpleNamespace(disk=lambda name: tmp_path / name, beside=lambda name: tmp_path / name, unread=unread)

    def watch(machine: Machine, marker: str, left_s: float, report: object) -> Watched:
        del marker, report
        assert left_s <= timeout_s
        if machine.bus == good:
            return Watched(Result.PASSED, "a login prompt", b"good", "", b"", 1.0)
        return Watched(Result.FAILED, f"`(initramfs)` with {machine.bus}", b"bad", "", b"", 1.0)

    monkeypatch.setattr(verify_module, "scratch_mount", scratch_mount)
    monkeypatch.setattr(verify_module, "Machine", Machine)
    monkeypatch.setattr(verify_module, "watch", watch)
    options = VerifyOptions(BOOT, timeout_s=timeout_s, machine=MachineOptions(bus=bus))
    run = verify_module._Run(repository, snapshot, options, ignore)
    run._boot()
    [outcome] = run.outcomes
    assert run.left[b"console.log"] == (b"good" if outcome.result == Result.PASSED else b"bad")
    # What the first one wrote is not there for the second.
    assert len(scratches) == len(Machine.started)
    return outcome, Machine.started


def test_a_bus_that_was_guessed_right_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, buses = booted(tmp_path, monkeypatch, good="auto")
    assert (outcome.result, outcome.words, buses) == (Result.PASSED, "a login prompt (bios, tcg)", ["auto"])


def test_a_bus_that_was_guessed_wrong_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, buses = booted(tmp_path, monkeypatch, good="virtio")
    assert (outcome.result, buses) == (Result.PASSED, ["auto", "virtio"])
    assert outcome.words == (
        "a login prompt (bios, tcg); its disks are on virtio then (--bus virtio): on scsi, `(initramfs)` with auto "
        "(bios, tcg)"
    )


def test_what_comes_up_on_no_bus_fails_with_both_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, buses = booted(tmp_path, monkeypatch, good="none")
    assert (outcome.result, buses) == (Result.FAILED, ["auto", "virtio"])
    assert "with auto (bios, tcg); its disks were on scsi, and on virtio, `(initramfs)` with virtio" in outcome.words


def test_a_machine_whose_disk_the_store_does_not_give_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Unread(tmp_path / "unread").note(StoreUnavailable("a pack cannot be had"))
    with pytest.raises(StoreError, match="nothing was recorded: a pack cannot be had"):
        booted(tmp_path, monkeypatch, good="none")
    outcome, _ = booted(tmp_path, monkeypatch, good="auto")
    assert outcome.result == Result.PASSED


def test_a_bus_that_was_given_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, buses = booted(tmp_path, monkeypatch, good="virtio", bus="sata")
    assert (outcome.result, buses) == (Result.FAILED, ["sata"])
    assert "try" not in outcome.words


def test_without_time_for_another_bus_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, buses = booted(tmp_path, monkeypatch, good="virtio", timeout_s=1)
    assert (outcome.result, buses) == (Result.FAILED, ["auto"])
    assert outcome.words.endswith("its disks were on scsi, which is a guess: try --bus virtio")
