"""Start a throw-away virtual machine from an image, for a person to look into; the image never changes."""

from collections.abc import Sequence

from backupfs.disks.machine import Machine, MachineDisk, MachineOptions, require_qemu
from backupfs.errors import SourceError
from backupfs.repository.repository import Repository
from backupfs.snapshots.snapshot import Snapshot
from backupfs.usecases.events import Remark, Report
from backupfs.usecases.scratch import require_image, scratch_mount

# The serial port on this terminal; Ctrl-A X ends the machine.
SERIAL_CONSOLE = ("-display", "none", "-serial", "mon:stdio")


def boot(
    repository: Repository, snapshot: Snapshot, options: MachineOptions, console: Sequence[str], report: Report
) -> None:
    """Run a machine on scratch copies of an image's disks until it is switched off.

    console: words for qemu that say where it is seen.
    Call it before any thread and event loop; indexes must be loaded.
    Raises: PathNotFound for a snapshot of files; SourceError; MountError.
    """
    require_image(snapshot)
    require_qemu()
    with scratch_mount(repository, snapshot) as scratch:
        disks = [MachineDisk(disk.name, scratch.disk(disk.name)) for disk in snapshot.disks]
        machine = Machine(disks, options, scratch.beside("machine"), console)
        report(Remark(f"booting by {machine.firmware} with {machine.accelerator}; what it writes is thrown away"))
        try:
            code = machine.wait()
        finally:
            machine.end()
    if code:
        raise SourceError(f"qemu ended with {code}: what it said stands above")
