"""A throw-away virtual machine on the files of disks: qemu, its monitor, and what its console shows.

The machine has no network unless it is asked for, and qemu runs in its own sandbox. It ends with this process.
Source: qemu-system-x86_64(1); the QMP reference of QEMU 7.2.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backupfs.disks.partitions import partitions_of
from backupfs.errors import SourceError
from backupfs.forked import end_with_parent

_PROGRAM = "qemu-system-x86_64"
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_QMP_S = 20.0
_PROBE_S = 5.0
_PROBE_WORD = b"K"
_FIRMWARE = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
_ESP, _BIOS_BOOT = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "21686148-6449-6e6f-744e-656564454649"
# Microsoft's reserved partition, and NTFS in an MBR.
_WINDOWS = frozenset({"e3c9e316-0b5c-4db8-817d-f92df00215ae", "07"})
# The text of a screen that is in no graphics mode: 80 by 25, a byte of character and one of colour each.
_TEXT_PLACE, _COLUMNS, _LINES = 0xB8000, 80, 25

# A boot sector that goes into protected mode, counts down from 300 million and writes a K to the first serial port. A
# processor does that in less than a second; a hypervisor that emulates instruction by instruction in minutes.
_PROBE = (
    bytes.fromhex("fa31c08ed80f0116")
    + (0x7C00 + 80).to_bytes(2, "little")
    + bytes.fromhex("0f20c06683c8010f22c0ea")
    + (0x7C00 + 25).to_bytes(2, "little")
    + bytes.fromhex("0800")
    + bytes.fromhex("66b810008ed8b9")
    + (300_000_000).to_bytes(4, "little")
    + bytes.fromhex("4975fdbaf8030000b04beef4ebfd")
).ljust(56, b"\0") + bytes(8) + bytes.fromhex("ffff0000009acf00") + bytes.fromhex("ffff00000092cf00") + (
    (23).to_bytes(2, "little") + (0x7C00 + 56).to_bytes(4, "little")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What a user can say about a machine."""

    memory: int = 1024  # MiB
    firmware: str = "auto"  # bios, uefi
    bus: str = "auto"  # virtio, scsi, sata, nvme
    accelerator: str = "auto"  # kvm, tcg
    has_network: bool = False


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of a machine."""

    name: str  # as on the server it comes from; says on which bus it was
    path: Path


def require_qemu() -> None:
    """Raises: SourceError where there is no qemu."""
    if shutil.which(_PROGRAM) is None:
        raise SourceError(f"booting takes {_PROGRAM}: install the package qemu-system-x86")


def kvm_works() -> bool:
    """Tell whether guests really run on this processor; that /dev/kvm exists proves nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    read, write = os.pipe()
    sector = os.memfd_create("probe")
    os.write(sector, _PROBE.ljust(510, b"\0") + b"\x55\xaa" + bytes(512))
    process = subprocess.Popen(
        [_PROGRAM, "-accel", "kvm", "-cpu", "host", "-m", "16", "-display", "none", "-nodefaults", "-no-reboot",
         "-chardev", f"file,id=c,path=/dev/fd/{write}", "-serial", "chardev:c",
         "-drive", f"file=/dev/fd/{sector},format=raw,if=ide,readonly=off"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write, sector),
        preexec_fn=end_with_parent,
    )  # fmt: skip
    os.close(write)
    os.set_blocking(read, False)
    try:
        deadline = time.monotonic() + _PROBE_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(BlockingIOError):
                if _PROBE_WORD in os.read(read, 100):
                    return True
            time.sleep(0.05)
        return False
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(sector)


def firmware_of(disk: Path) -> str:
    """Return what a disk is booted by: uefi if it has a system partition and nothing for a BIOS to begin with.

    Code in the first sector counts where there is no GPT: Windows puts some before each, which only says that it fails.
    """
    kinds = _kinds_of(disk)
    if _ESP in kinds:
        return "bios" if _BIOS_BOOT in kinds else "uefi"
    with open(disk, "rb") as file:
        has_code = any(file.read(440))
    return "uefi" if "ef" in kinds and not has_code else "bios"


def bus_of(disk: MachineDisk) -> str:
    """Return where a disk was: what it is called says so. Windows knows nothing of virtual buses."""
    if disk.name.startswith("nvme"):
        return "nvme"
    if _kinds_of(disk.path) & _WINDOWS:
        return "sata"
    return "scsi" if disk.name.startswith(("sd", "hd")) else "virtio"


class Machine:
    """A running machine. Belongs to one thread."""

    def __init__(
        self, disks: Sequence[MachineDisk], options: MachineOptions, folder: Path, console: Sequence[str] = ()
    ) -> None:
        """Start it.

        folder: empty, for sockets and logs. console: words for qemu that say where a person sees it; none by default.
        Raises: SourceError.
        """
        require_qemu()
        self.accelerator = options.accelerator
        if self.accelerator == "auto":
            self.accelerator = "kvm" if kvm_works() else "tcg"
        self.firmware = firmware_of(disks[0].path) if options.firmware == "auto" else options.firmware
        self._folder = folder
        self._serial = folder / "serial"
        self._log = folder / "qemu.log"
        self._picture = folder / "screen"
        self._is_watched = not console
        # Paths of sockets are short, and folders may lie deep: they are named from within.
        self._folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        command = [*self._hardware(options), *_drives(disks, options.bus), *(console or self._ports())]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL if self._is_watched else None,
                stdout=log if self._is_watched else None, stderr=log if self._is_watched else None,
                # What is typed at a terminal is for who watches it, who ends it then.
                preexec_fn=end_with_parent, start_new_session=self._is_watched,
                cwd=folder if self._is_watched else None,
            )  # fmt: skip
        self._monitor: _Monitor | None = None
        self._agent: socket.socket | None = None
        if self._is_watched:
            try:
                self._monitor = _Monitor(self._socket_path("qmp"), self._process)
            except OSError as error:
                self.end()
                raise SourceError(f"qemu does not start: {self._last_words() or error}") from error
            except BaseException:
                self.end()
                raise

    def _hardware(self, options: MachineOptions) -> list[str]:
        words = [
            _PROGRAM, "-machine", "q35" if self.firmware == "uefi" else "pc", "-accel", self.accelerator,
            "-m", str(options.memory),
            "-cpu", "host" if self.accelerator == "kvm" else "max", "-smp", str(min(2, os.cpu_count() or 1)),
            "-sandbox", _SANDBOX, "-no-reboot", "-nodefaults", "-device", "virtio-rng-pci",
        ]  # fmt: skip
        words += ["-nic", "user,model=virtio-net-pci" if options.has_network else "none"]
        if self.firmware == "uefi":
            code, variables = _firmware_files()
            own = self._folder / "variables"
            shutil.copyfile(variables, own)
            words += ["-drive", f"if=pflash,format=raw,readonly=on,file={code}"]
            words += ["-drive", f"if=pflash,format=raw,file={own}", "-device", "VGA"]
        else:
            # No driver of a kernel knows it, so the screen stays in text mode and can be read. (Not on a q35.)
            words += ["-vga", "none", "-device", "isa-vga"]
        return words

    def _ports(self) -> list[str]:
        return [
            "-display", "none", "-chardev", f"file,id=console,path={self._serial}", "-serial", "chardev:console",
            "-qmp", "unix:qmp,server=on,wait=off", "-device", "virtio-serial",
            "-chardev", "socket,id=agent,path=agent,server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ]  # fmt: skip

    def _socket_path(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder_fd}/{name}"

    @property
    def has_ended(self) -> bool:
        """Tell whether the machine is off."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait until the machine is off; return qemu's exit code."""
        return self._process.wait()

    def console(self) -> bytes:
        """Return what came out of the serial port."""
        try:
            return self._serial.read_bytes()
        except OSError:
            return b""

    def screen_text(self) -> str:
        """Return the text on a screen that is in no graphics mode; empty for others and once it has ended."""
        data = self._saved("pmemsave", {"val": _TEXT_PLACE, "size": 2 * _COLUMNS * _LINES})
        cells = data[::2].decode("cp437")
        lines = [cells[at : at + _COLUMNS].replace("\0", " ").rstrip() for at in range(0, len(cells), _COLUMNS)]
        return "\n".join(lines).strip()

    def screen_picture(self) -> bytes:
        """Return the screen as a PNG; empty where there is none."""
        return self._saved("screendump", {"format": "png"})

    def _saved(self, command: str, arguments: dict[str, object]) -> bytes:
        if self._monitor is None:
            return b""
        self._picture.unlink(missing_ok=True)
        try:
            self._monitor.run(command, {**arguments, "filename": str(self._picture)})
            return self._picture.read_bytes()
        except OSError:
            return b""

    def agent_answers(self) -> bool:
        """Tell whether the guest's agent answers; asks it by the way."""
        try:
            if self._agent is None:
                self._agent = socket.socket(socket.AF_UNIX)
                self._agent.connect(self._socket_path("agent"))
                self._agent.setblocking(False)
            self._agent.send(b'{"execute":"guest-ping"}\n')
            return b'"return"' in self._agent.recv(4096)
        except OSError:
            return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log.read_text("utf-8", "replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def end(self) -> None:
        """Switch it off."""
        self._process.kill()
        self._process.wait()
        for one in (self._monitor, self._agent):
            if one is not None:
                one.close()
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1


class _Monitor:
    """qemu's own line of commands."""

    def __init__(self, path: str, process: "subprocess.Popen[bytes]") -> None:
        """Raises: OSError."""
        deadline = time.monotonic() + _QMP_S
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(path)
                break
            except OSError:
                self._socket.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._socket.settimeout(_QMP_S)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.run("qmp_capabilities", {})

    def run(self, command: str, arguments: dict[str, object]) -> None:
        """Run a command and wait for its end. Raises: OSError."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return
            if "error" in answer:
                raise OSError(f"{command}: {answer['error'].get('desc', '')}")
        raise ConnectionError("qemu ended")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


def _drives(disks: Sequence[MachineDisk], bus: str) -> list[str]:
    words = ["-device", "ich9-ahci,id=sata", "-device", "virtio-scsi-pci,id=scsi"]
    for number, disk in enumerate(disks):
        path = str(disk.path).replace(",", ",,")
        words += ["-drive", f"file={path},format=raw,if=none,id=d{number},cache=unsafe,discard=ignore"]
        device = {
            "sata": f"ide-hd,bus=sata.{number}",
            "scsi": "scsi-hd,bus=scsi.0",
            "nvme": f"nvme,serial=disk{number}",
            "virtio": "virtio-blk-pci",
        }[bus_of(disk) if bus == "auto" else bus]
        words += ["-device", f"{device},drive=d{number},bootindex={number + 1}"]
    return words


def _kinds_of(disk: Path) -> set[str]:
    """Return the types of a disk's partitions."""
    with open(disk, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        return {part.kind for part in partitions_of(read, file.seek(0, os.SEEK_END))}


def _firmware_files() -> tuple[str, str]:
    for code, variables in _FIRMWARE:
        if os.path.exists(code) and os.path.exists(variables):
            return code, variables
    raise SourceError("the disk is booted by UEFI, which takes its firmware: install the package ovmf")
