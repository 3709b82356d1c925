"""key: the passwords that open a repository."""

from typing import TYPE_CHECKING

import click

from backupfs.cli.settings import Settings, as_text, run_case, with_settings
from backupfs.errors import shown

if TYPE_CHECKING:
    from backupfs.cli.report import Value
    from backupfs.repository.repository import KeySlot, Repository

_NEW_PASSWORD = click.option(
    "--new-password-file", metavar="FILE", help="Read the new password from the first line of FILE."
)


@click.group("key")
def key_command() -> None:
    """List, add, remove and change the repository's passwords.

    Each password has a key slot of its own; all of them open the same data. Nothing is encrypted again when one
    changes.
    """


@key_command.command("list")
@with_settings
def list_command(settings: Settings) -> int:
    """Show the key slots; * marks the one that the present password opens."""
    from backupfs.cli.report import print_json, time_text
    from backupfs.usecases.keys import list_slots

    slots = run_case(list_slots, _opened(settings))
    for slot in slots:
        if not settings.json:
            click.echo(
                f"{'*' if slot.own else ' '} {slot.slot_id.hex()[:8]}  {time_text(slot.created_ns)}  {shown(slot.name)}"
            )
    if settings.json:
        print_json([_value(slot) for slot in slots])
    return 0


@key_command.command("add")
@click.option("--name", callback=as_text, default="", help="A name to know the slot by.")
@_NEW_PASSWORD
@with_settings
def add_command(settings: Settings, name: str, new_password_file: str | None) -> int:
    """Give the repository one more password."""
    from backupfs.cli.passwords import read_new_password
    from backupfs.usecases.keys import add_slot

    repository = _opened(settings)
    password = read_new_password(new_password_file)
    _tell(settings, "added", run_case(add_slot, repository, password, name))
    return 0


@key_command.command("remove")
@click.argument("slot")
@with_settings
def remove_command(settings: Settings, slot: str) -> int:
    """Take a password away; SLOT is the start of its id, or its name. The last one cannot be removed."""
    from backupfs.usecases.keys import remove_slot

    _tell(
        settings,
        "removed",
        run_case(remove_slot, _opened(settings), slot),
    )
    return 0


@key_command.command("change")
@_NEW_PASSWORD
@with_settings
def change_command(settings: Settings, new_password_file: str | None) -> int:
    """Change the password in use."""
    from backupfs.cli.passwords import read_new_password
    from backupfs.usecases.keys import change_password

    repository = _opened(settings)
    password = read_new_password(new_password_file)
    _tell(settings, "changed", run_case(change_password, repository, password))
    return 0


def _opened(settings: Settings) -> "Repository":
    return settings.open_repository("backupfs.usecases.keys", snapshots=False, files=False)


def _value(slot: "KeySlot") -> "dict[str, Value]":
    return {"id": slot.slot_id.hex(), "name": slot.name, "created_ns": slot.created_ns, "own": slot.own}


def _tell(settings: Settings, what: str, slot: "KeySlot") -> None:
    from backupfs.cli.report import print_json

    if settings.json:
        print_json({what: _value(slot)})
    elif not settings.quiet:
        click.echo(f"{what} the key slot {slot.slot_id.hex()[:8]} {shown(slot.name)}".rstrip())
