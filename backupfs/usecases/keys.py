"""Key slots: who can open the repository. A password change rewrites one slot and no data."""

from backupfs import workers
from backupfs.codec.keys import KdfCost
from backupfs.errors import UsageError, shown
from backupfs.ids import short
from backupfs.repository.repository import KeySlot, Repository


async def list_slots(repository: Repository) -> list[KeySlot]:
    """Return the key slots, oldest first. Raises: StoreError."""
    return await workers.request(repository.slots)


async def add_slot(repository: Repository, password: bytes, name: str) -> KeySlot:
    """Give the repository's keys to one more password. Raises: StoreError."""
    slot_id = await workers.request(repository.add_slot, password, name, KdfCost())
    return await workers.request(repository.slot, slot_id)


async def remove_slot(repository: Repository, name: str) -> KeySlot:
    """Take a slot away, named by its id, the start of it, or its name.

    Raises: UsageError if it is the last one, unknown, or not the only one of that name; StoreError.
    """
    slots = await list_slots(repository)
    fitting = [slot for slot in slots if slot.slot_id.hex().startswith(name.lower())] if len(name) >= 2 else []
    fitting = fitting or [slot for slot in slots if slot.name == name]
    if not fitting:
        raise UsageError(f"there is no key slot {shown(name)}; `backupfs key list` shows them")
    if len(fitting) > 1:
        raise UsageError(f"{shown(name)} fits {len(fitting)} key slots: give more digits of the id")
    if len(slots) == 1:
        raise UsageError("this is the last key slot: without it nobody could read the repository; add another first")
    if not any(slot.own for slot in slots if slot is not fitting[0]):
        raise UsageError(
            f"{short(fitting[0].slot_id)} is the slot of the password in use: open the repository with another slot's"
            " password to remove it, or use `backupfs key change`"
        )
    await workers.request(repository.remove_slot, fitting[0].slot_id)
    return fitting[0]


async def change_password(repository: Repository, password: bytes) -> KeySlot:
    """Replace the password in use: the new slot is put and opened before the old one goes. Raises: StoreError."""
    own = await workers.request(repository.slot, repository.slot_id)
    added = await add_slot(repository, password, own.name)
    await workers.request(repository.remove_slot, own.slot_id)
    return added
