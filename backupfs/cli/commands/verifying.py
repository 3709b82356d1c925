"""verify, boot: proving that a snapshot is of use, and using it at once."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from backupfs.cli.settings import Settings, with_settings
from backupfs.errors import UsageError

if TYPE_CHECKING:
    from backupfs.disks.machine import MachineOptions

_MACHINE = (
    click.option("--memory", default="1G", show_default=True, metavar="SIZE", help="Memory of the machine."),
    click.option(
        "--firmware", type=click.Choice(["auto", "bios", "uefi"]), default="auto", show_default=True,
        help="What the machine begins with.",
    ),
    click.option(
        "--bus", type=click.Choice(["auto", "virtio", "scsi", "sata", "nvme"]), default="auto", show_default=True,
        help="How the machine has its disks; auto goes by their names, and `verify` then tries another, if need be.",
    ),
    click.option(
        "--accelerator", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True,
        help="tcg runs everywhere, slowly; auto takes kvm where a try shows that guests run by it.",
    ),
)  # fmt: skip


def _with_machine(function: Callable[..., object]) -> Callable[..., object]:
    for option in reversed(_MACHINE):
        function = option(function)
    return function


@click.command("verify")
@click.argument("snap", metavar="SNAP")
@click.option("--level", default=2, show_default=True, metavar="N", help="How far to go: 0 to 3, of files to 2.")
@click.option("--marker", default="", metavar="TEXT", help="Level 3: this on the console means that it is up.")
@click.option(
    "--timeout",
    type=int,
    metavar="SECONDS",
    help="How long booting may take, and each program of level 2 (default: 900, and 6 hours).",
)
@click.option("--no-record", is_flag=True, help="Store no record of it.")
@_with_machine
@with_settings
def verify_command(
    settings: Settings,
    snap: str,
    level: int,
    marker: str,
    timeout: int | None,
    no_record: bool,
    memory: str,
    firmware: str,
    bus: str,
    accelerator: str,
) -> int:
    """Prove that a snapshot can be used, level by level, and keep a record of that.

    \b
    0  all its metadata is read and authenticated, and every pack it needs is there
    1  every byte it needs is read again and compared with its hash
    2  an image: its file systems are checked by their own programs (e2fsck, xfs_repair …)
       files: every one is read through the mount
    3  an image: it is booted in a virtual machine without a network, until a login prompt, the guest's
       agent or --marker is there

    Each level includes those below. What is checked or booted are scratch copies: the image never changes. The record
    is shown by `snapshots --verbose` and in the mount, images/NAME/TIME/.verify, with logs and a picture of the screen.
    Ends with 1 when a level failed.
    """
    machine = _machine_options(memory, firmware, bus, accelerator)
    repository = settings.open_repository("backupfs.usecases.verify")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_verification
    from backupfs.snapshots.listing import load_all
    from backupfs.snapshots.verification import Result
    from backupfs.usecases.verify import VerifyOptions, record, verify

    snapshot = load_all(repository).find(snap)
    report = Reporter(settings)
    options = VerifyOptions(level, marker, machine=machine)
    if timeout is not None:
        options = replace(options, timeout_s=timeout, check_s=timeout)
    verified = verify(repository, snapshot, options, report)
    made = verified.made
    report.clear()
    # Before the record is stored: it may have taken hours, and the repository may be full.
    tell_verification(settings, made)
    if not no_record:
        record(repository, verified)
    return 1 if made.result == Result.FAILED else 0


@click.command("boot")
@click.argument("snap", metavar="SNAP")
@click.option(
    "--display", metavar="WHAT", help="Show its screen: gtk, sdl, curses or vnc=:1 (default: serial port here)."
)
@click.option("--network", is_flag=True, help="Give it a network behind this host's; without, it is cut off.")
@_with_machine
@with_settings
def boot_command(
    settings: Settings,
    snap: str,
    display: str | None,
    network: bool,
    memory: str,
    firmware: str,
    bus: str,
    accelerator: str,
) -> int:
    """Start a throw-away virtual machine from an image, straight from the repository.

    It is up as soon as what it reads has been fetched, whatever the size of its disks. What it writes is thrown away
    when it is switched off. Its serial port is this terminal; Ctrl-A X switches it off.
    """
    machine = _machine_options(memory, firmware, bus, accelerator, network)
    repository = settings.open_repository("backupfs.usecases.boot")
    from backupfs.cli.report import Reporter
    from backupfs.snapshots.listing import load_all
    from backupfs.usecases.boot import SERIAL_CONSOLE, boot

    snapshot = load_all(repository).find(snap)
    console = ("-display", display, "-serial", "null") if display else SERIAL_CONSOLE
    boot(repository, snapshot, machine, console, Reporter(settings))
    return 0


def _machine_options(
    memory: str, firmware: str, bus: str, accelerator: str, has_network: bool = False
) -> "MachineOptions":
    from backupfs.cli.values import size
    from backupfs.disks.machine import MachineOptions

    mib = size(memory) >> 20
    if mib < 16:
        raise UsageError(f"--memory {memory}: a machine takes 16M and more")
    return MachineOptions(mib, firmware, bus, accelerator, has_network)
