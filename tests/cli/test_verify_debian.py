"""A real system boots from its image, and from what was changed in the image; `scripts/prepare --machine` makes it."""

import re
from pathlib import Path

import pytest

from tests.cli.test_commands import Cli

DISK = Path(__file__).resolve().parents[2] / ".servers/debian/disk.raw"
LEVEL_3 = ("--level", "3", "--memory", "512M", "--accelerator", "tcg", "--timeout", "500")
BOOT_PARTITION_MIB = 1
MARKER = "put into the image"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A repository with one image of the machine; each test makes children of its own."""
    if not DISK.exists():
        pytest.fail("the machine that is booted here is missing: run scripts/prepare --machine")
    folder = tmp_path_factory.mktemp("debian")
    # Without a hypervisor it takes a minute to boot, and several on a busy computer.
    cli = Cli(folder, timeout_s=600)
    cli.environment["HOME"] = str(folder)
    cli("init")
    cli("image", f"vda={DISK}", "--name", "debian")
    return cli


def outcomes(summary: dict) -> list[tuple[int, str | None, str]]:
    return [(one["level"], one["subject"], one["result"]) for one in summary["outcomes"]]


@pytest.mark.fuse
@pytest.mark.slow
def test_a_debian_boots_from_its_image(cli: Cli, tmp_path: Path) -> None:
    image = cli.json("snapshots")[0]["id"]
    *_, summary = cli.json("verify", image, *LEVEL_3)
    assert outcomes(summary) == [
        (0, None, "passed"), (1, None, "passed"), (2, "vda1", "passed"), (2, "vda2", "passed"), (3, "vda", "passed"),
    ]  # fmt: skip
    # It has two: which shows a prompt first is chance.
    assert re.match("a login prompt on the (console|screen) ", summary["outcomes"][-1]["words"])
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    cli("mount", mountpoint)
    try:
        [record] = (mountpoint / "ids" / image[:8] / ".verify").iterdir()
        assert b"Linux version" in (record / "console.log").read_bytes()
        assert (record / "screen.png").read_bytes().startswith(b"\x89PNG")
    finally:
        cli("umount", mountpoint)


@pytest.mark.fuse
@pytest.mark.slow
def test_what_was_put_into_the_image_is_what_boots(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "issue").write_text(f"{MARKER}\n")
    *_, made = cli.json("put", f"{cli.json('snapshots')[0]['id']}:/files/vda2/etc/issue", tmp_path / "issue")
    child = made["snapshot"]["id"]
    *_, summary = cli.json("verify", child, *LEVEL_3, "--marker", MARKER)
    assert {one["result"] for one in summary["outcomes"]} == {"passed"}
    assert "the marker on the" in summary["outcomes"][-1]["words"]


@pytest.mark.fuse
def test_a_debian_without_its_boot_loader_fails_where_it_is_booted(cli: Cli) -> None:
    wipe = f"dd if=/dev/zero of=$BACKUPFS_EDIT/disks/vda.raw bs=1M seek={BOOT_PARTITION_MIB} count=1 conv=notrunc"
    *_, made = cli.json("edit", cli.json("snapshots")[0]["id"], "--unchecked", "--run", wipe)
    *_, summary = cli.json("verify", made["snapshot"]["id"], *LEVEL_3, code=1)
    assert outcomes(summary)[:2] == [(0, None, "passed"), (1, None, "passed")]
    assert outcomes(summary)[-1] == (3, "vda", "failed")
    assert "`No bootable device` on the screen" in summary["outcomes"][-1]["words"]
