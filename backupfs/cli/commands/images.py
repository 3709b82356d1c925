"""image, index, export: whole disks, into snapshots and out of them."""

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator

import click

from backupfs.cli.settings import PATH, Settings, as_host, as_text, with_settings
from backupfs.errors import SourceError, UsageError, shown

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def with_luks(command: Callable[..., object]) -> Callable[..., object]:
    """Give a command the options for what is encrypted in disks, and what they say as `luks_passphrases`."""

    @click.option(
        "--luks-passphrase-file",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help="Show the files in volumes encrypted with LUKS, with the passphrase in FILE's first line. The snapshot "
        "then holds their keys: who can open the repository can read their files.",
    )
    @click.option(
        "--luks-key-file",
        multiple=True,
        type=PATH,
        metavar="FILE",
        help="The same, with all bytes of FILE as they are.",
    )
    @click.option("--luks-ask", is_flag=True, help="The same, with a passphrase that is asked for.")
    @functools.wraps(command)
    def run(
        *words: object,
        luks_passphrase_file: tuple[bytes, ...],
        luks_key_file: tuple[bytes, ...],
        luks_ask: bool,
        **options: object,
    ) -> object:
        from backupfs.cli import passwords

        found = passwords.read_luks_passphrases(luks_passphrase_file, luks_key_file, luks_ask)
        return command(*words, luks_passphrases=found, **options)

    return run


@click.command("image")
@click.argument("disks", nargs=-1, type=PATH, metavar="[NAME=]DISK...")
@click.option(
    "--name",
    callback=as_text,
    default="",
    metavar="NAME",
    help="What the image is called, and found by (default: the host).",
)
@click.option("--tag", callback=as_text, multiple=True, metavar="TAG", help="Tag the snapshot.")
@click.option("--host", callback=as_host, default="", metavar="NAME", help="Another host name than this machine's.")
@click.option("--time", "when", metavar="TIME", help="Another time than now: 2026-11-22T08:13:11, with Z or +01:00.")
@click.option("--force", is_flag=True, help="Compare with no other image; look through all file systems again.")
@click.option(
    "--hints",
    multiple=True,
    type=PATH,
    metavar="[DISK=]FILE",
    help="A map of what changed on a disk since an image: only that is read, and samples of the rest. "
    "Lines START LENGTH data|zero|same, or what qemu-img map --output=json or thin_delta print.",
)
@click.option("--hints-since", default="", metavar="ID", help="The image that maps count from.")
@click.option(
    "--skip-free",
    is_flag=True,
    help="Leave out the free space of ext2/3/4, XFS, btrfs, NTFS and FAT that are unmounted or frozen and clean: "
    "it becomes zeros.",
)
@click.option("--freeze", is_flag=True, help="Freeze mounted file systems on the disks while these are read.")
@click.option("--before", metavar="COMMAND", help="Run COMMAND before disks are opened: to freeze, or to snapshot.")
@click.option(
    "--after", metavar="COMMAND", help="Run COMMAND at the end, whatever came of the disks, and of --before, too."
)
@click.option("--compression", default="auto", metavar="LEVEL", help="off, auto, or 1 to 19.", show_default=True)
@click.option(
    "--format",
    "forms",
    multiple=True,
    type=PATH,
    metavar="[DISK=]FORMAT",
    help="The format of a file, or of all: raw, qcow2, vmdk, vhd, vhdx or vdi. (Default: raw for names that end in "
    ".raw, .img, .dd and .iso; else what the file begins like.)",
)
@click.option(
    "--backing-folder",
    multiple=True,
    type=PATH,
    metavar="DIR",
    help="Let files name others in DIR and below that they are made of (backing files, extents); by themselves they "
    "may name those in their own folder and below.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Read and count, store nothing.")
@with_luks
@with_settings
def image_command(
    settings: Settings,
    disks: tuple[bytes, ...],
    name: str,
    tag: tuple[str, ...],
    host: str,
    when: str | None,
    force: bool,
    hints: tuple[bytes, ...],
    hints_since: str,
    skip_free: bool,
    freeze: bool,
    before: str | None,
    after: str | None,
    compression: str,
    forms: tuple[bytes, ...],
    backing_folder: tuple[bytes, ...],
    dry_run: bool,
    luks_passphrases: tuple[bytes, ...],
) -> int:
    """Make an image of disks: block devices, or files that hold one, raw or as qcow2, VMDK, VHD, VHDX or VDI.

    All disks given become one snapshot, which shows each as a file, disks/NAME.raw, bit for bit. What is zero takes
    no space, and what the repository has is not stored again: the next image of a disk costs what changed. Every image
    is whole by itself. The disks must not change meanwhile: stop or freeze what writes to them (--freeze), or give
    snapshots of them (LVM, the hypervisor's).
    """
    from backupfs.cli import values

    level = values.level(compression)
    time_ns = values.moment_ns(when) if when is not None else None
    if not disks:
        raise UsageError("what to make an image of? give a DISK, as in /dev/vda or disk.raw")
    repository = settings.open_repository("backupfs.usecases.image")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_image
    from backupfs.disks.source import open_disk
    from backupfs.usecases.image import ImageOptions, image
    from backupfs.usecases.image_hints import load_hints

    if hints_since and not hints:
        raise UsageError("--hints-since says what --hints counts from, which is not given")
    given = [_named(words) for words in disks]
    formats = _formats(forms, given)
    report = Reporter(settings)
    with contextlib.ExitStack() as opened:
        failed = opened.enter_context(_between(before, after))
        sources = []
        for (disk, path), form in zip(given, formats, strict=True):
            source = open_disk(path, disk, form, backing_folder)
            opened.callback(source.close)
            sources.append(source)
        options = ImageOptions(
            host=host, tags=tag, time_ns=time_ns, level=level, dry_run=dry_run, name=name, force=force,
            hints=load_hints([_named(words) for words in hints], hints_since.lower(), sources),
            luks_passphrases=luks_passphrases, skips_free=skip_free, freezes=freeze,
        )  # fmt: skip
        result = image(repository, sources, options, report)
    report.clear()
    tell_image(settings, result)
    return 3 if report.skipped or failed else 0


@click.command("index")
@click.argument("name", metavar="SNAP")
@click.option("--force", is_flag=True, help="Look into all of it again, also where files are shown already.")
@with_luks
@with_settings
def index_command(settings: Settings, name: str, force: bool, luks_passphrases: tuple[bytes, ...]) -> int:
    """Find the files in an image that was taken without looking for them, and show them from now on.

    The disks are read from the repository; the image itself does not change. With --force all file systems are gone
    through again, after an upgrade that reads them better, or where `check` found damaged trees of files.
    """
    repository = settings.open_repository("backupfs.usecases.index")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_index
    from backupfs.snapshots.listing import load_all
    from backupfs.usecases.index import IndexOptions, index

    listed = load_all(repository)
    report = Reporter(settings)
    result = index(
        repository, listed, listed.find(name), IndexOptions(force=force, luks_passphrases=luks_passphrases), report
    )
    report.clear()
    tell_index(settings, result)
    return 3 if report.skipped else 0


@click.command("export")
@click.argument("what", metavar="SNAP[:DISK]", type=PATH)
@click.argument("file", type=PATH)
@click.option(
    "--format",
    "form",
    default="raw",
    show_default=True,
    metavar="FORMAT",
    help="raw, or with qemu-utils qcow2, vmdk, vhd, vhdx or vdi.",
)
@with_settings
def export_command(settings: Settings, what: bytes, file: bytes, form: str) -> int:
    """Write a disk of an image to the new file FILE, for a virtual machine, and compare it with the image."""
    from backupfs.cli.values import own_folders, split_disk

    name, disk = split_disk(what)
    repository = settings.open_repository("backupfs.usecases.export")
    from backupfs.cli.report import Reporter
    from backupfs.cli.summaries import tell_restore_image
    from backupfs.snapshots.listing import load_all
    from backupfs.usecases.export import export

    snapshot = load_all(repository).find(name)
    report = Reporter(settings)
    own = own_folders(settings.folders(), repository.store)
    result = export(repository, snapshot, disk, os.path.abspath(file), form, report, own)
    report.clear()
    tell_restore_image(settings, result, verb="exported")
    return 0


def _formats(words: tuple[bytes, ...], disks: list[tuple[str, bytes]]) -> list[str]:
    """Return the format of each disk by qemu's name, or nothing, as options [DISK=]FORMAT say. Raises: UsageError."""
    from backupfs.disks.chain import FORMATS
    from backupfs.disks.source import default_name

    by_name: dict[str, str] = {}
    for one in words:
        name, _, form = os.fsdecode(one).rpartition("=")
        if form not in FORMATS:
            raise UsageError(f"--format {shown(one)}: the format is one of {', '.join(FORMATS)}")
        by_name[name] = FORMATS[form]
    names = [name or default_name(os.path.abspath(path)) for name, path in disks]
    for name in by_name.keys() - {"", *names}:
        raise UsageError(f"--format {shown(name)}={by_name[name]}: there is no disk {shown(name)} among those given")
    return [by_name.get(name, by_name.get("", "")) for name in names]


def _named(words: bytes) -> tuple[str, bytes]:
    """Return (name or nothing, path) of NAME=PATH."""
    name, equals, path = words.partition(b"=")
    if equals and b"/" not in name and not os.path.lexists(words):
        return os.fsdecode(name), path
    return "", words


@contextlib.contextmanager
def _between(before: str | None, after: str | None) -> Iterator[list[str]]:
    """Run commands of the user around what is done; nothing is done if the first one fails.

    The second one is run then, too, and after an interrupt: the first may have done half of its work.
    Gives a list that has the second one in it, once that has failed.
    """
    failed: list[str] = []
    try:
        if before and (code := _run(before)):
            raise SourceError(f"the command before the image ended with {code}, so no disk was read: {shown(before)}")
        yield failed
    finally:
        if after:
            code = _run(after)
            if code:
                failed.append(after)
                # The image stands; what it was frozen for may still be frozen.
                logging.getLogger(__name__).error("the command after the image ended with %d: %s", code, shown(after))


def _run(command: str) -> int:
    """Run a command of the user and return its exit code; an interrupt ends it, too."""
    import subprocess

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    # Until it is known which process it is, an interrupt would leave it running.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        # Its words go where they disturb no JSON.
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=unblock)
    except BaseException:
        unblock()
        raise
    with process:
        try:
            unblock()
            return process.wait()
        except BaseException:
            process.kill()
            raise
