"""What this machine keeps of its own: the cache (deletable at any time) and the host's identity (its state).

CACHE/REPOSITORY-ID/index-data/*.run, index-tree/*.run
CACHE/REPOSITORY-ID/objects/   what is kept of a store that is far away (stores/caching.py)
CACHE/REPOSITORY-ID/blocks/    blocks of data, where the user wants that (repository/chunks.py)
CACHE/REPOSITORY-ID/listed-*   empty; touched when packs were listed
CACHE/REPOSITORY-ID/writing-*  empty; while a run may have put packs that no segment names, and if it failed or died
CACHE/slot-URL     the id of the key slot that opened the repository at this URL (its hash) the last time; no secret
STATE/host       a record [host id, hash of the machine id]
STATE/last-REPOSITORY-ID   a record [[host id, sequence, snapshot id], …]: each host's last snapshot that was seen here;
                              those of one sequence, which were made at once, have a row each
STATE/damaged-REPOSITORY-ID   a record [[pack id, sequence], …]: packs that a check found damaged, and the sequence of
                              this host's last snapshot by then
"""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject
from backupfs.ids import ID_SIZE, ObjectId

HOST_ID_SIZE = 16
Last = tuple[int, tuple[bytes, ...]]  # the number of a host's last snapshot, and its id; several if made at once


@dataclass(frozen=True, slots=True)
class LocalFolders:
    """Where a client keeps what is its own; None: nowhere, everything stays in memory."""

    cache: Path | None
    state: Path | None


def default_folders() -> LocalFolders:
    """Return the folders that the environment names, else those of the XDG base directories."""
    home = Path(os.path.expanduser("~"))
    cache = os.environ.get("BACKUPFS_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or home / ".cache", "backupfs"
    )
    state = os.path.join(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state", "backupfs")
    return LocalFolders(Path(cache), Path(state))


def host_id(state: Path | None) -> bytes:
    """Return this host's random id; a new one when the machine id has changed, as in a cloned machine.

    Without a folder to keep it in, each call gives a new one.
    """
    machine = _machine_mark()
    path = state / "host" if state is not None else None
    if path is not None:
        try:
            match decode_record(path.read_bytes(), str(path)):
                case [bytes(known), bytes(mark)] if mark == machine and len(known) == HOST_ID_SIZE:
                    return known
        except (OSError, DamagedObject):
            pass
    fresh = os.urandom(HOST_ID_SIZE)
    if path is not None:
        with contextlib.suppress(OSError):
            write_privately(path, encode_record([fresh, machine]))
    return fresh


def last_seen(state: Path | None, repository_id: bytes) -> dict[bytes, Last]:
    """Return the last snapshot of each host that was ever seen here, by the host's id."""
    found: dict[bytes, Last] = {}
    if state is not None:
        with contextlib.suppress(OSError, DamagedObject):
            path = _seen_path(state, repository_id)
            for entry in decode_record(path.read_bytes(), str(path)):
                match entry:
                    case [bytes(host), int(number), bytes(snapshot_id)]:
                        own = number, ((snapshot_id,) if snapshot_id else ())
                        found[host] = later_of(found.get(host, own), own)
    return found


def later_of(one: Last, other: Last) -> Last:
    """Return the later of two, or both together if they have one number."""
    if one[0] == other[0]:
        return one[0], tuple(sorted({*one[1], *other[1]}))
    return max(one, other)


def note_seen(state: Path | None, repository_id: bytes, lasts: Mapping[bytes, Last]) -> bool:
    """Remember the last snapshot of each host; one that is earlier than what was seen changes nothing.

    Return whether all of it is remembered.
    """
    if state is None:
        return False
    seen = last_seen(state, repository_id)
    merged = {host: later_of(seen.get(host, (0, ())), lasts.get(host, (0, ()))) for host in {*seen, *lasts}}
    if merged != seen:
        rows: list[Field] = [
            [host, number, last] for host, (number, ids) in sorted(merged.items()) for last in ids or (b"",)
        ]
        try:
            write_privately(_seen_path(state, repository_id), encode_record(rows))
        except OSError:
            return False
    return True


def _seen_path(state: Path, repository_id: bytes) -> Path:
    return state / f"last-{repository_id.hex()}"


def damaged_packs(state: Path | None, repository_id: bytes) -> dict[bytes, int]:
    """Return the packs that checks of this machine found damaged: id → sequence of the host's last snapshot by then."""
    return _read_numbers(state / f"damaged-{repository_id.hex()}") if state is not None else {}


def note_damaged_packs(state: Path | None, repository_id: bytes, packs: dict[bytes, int]) -> bool:
    """Remember damaged packs instead of those from before; return whether that could be done."""
    if state is None:
        return False
    path = state / f"damaged-{repository_id.hex()}"
    try:
        if packs:
            _write_numbers(path, packs)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _read_numbers(path: Path) -> dict[bytes, int]:
    numbers: dict[bytes, int] = {}
    try:
        for entry in decode_record(path.read_bytes(), str(path)):
            match entry:
                case [bytes(name), int(number)]:
                    numbers[name] = number
    except (OSError, DamagedObject):
        pass
    return numbers


def _write_numbers(path: Path, numbers: dict[bytes, int]) -> None:
    write_privately(path, encode_record([[name, number] for name, number in sorted(numbers.items())]))


def known_slot(cache: Path | None, url: str) -> ObjectId | None:
    """Return the id of the key slot that opened the repository at a URL the last time."""
    try:
        name = _slot_file(cache, url).read_bytes() if cache is not None else b""
    except OSError:
        return None
    return ObjectId(name) if len(name) == ID_SIZE else None


def note_slot(cache: Path | None, url: str, slot_id: ObjectId) -> None:
    """Remember which key slot opened the repository at a URL."""
    if cache is not None and known_slot(cache, url) != slot_id:
        with contextlib.suppress(OSError):
            write_privately(_slot_file(cache, url), slot_id)


def _slot_file(cache: Path, url: str) -> Path:
    return cache / f"slot-{blake3(url.encode()).hexdigest()[:32]}"


def is_due(folder: Path | None, name: str, every_s: float) -> bool:
    """Tell whether something that costs should be done again, by the file `name` that was touched when it was last.

    Without a folder it is always due.
    """
    if folder is None:
        return True
    try:
        age_s = time.time() - (folder / name).stat().st_mtime
    except OSError:
        return True
    return not 0 <= age_s < every_s


def note_done(folder: Path | None, name: str) -> None:
    """Remember that something was done now."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / name).touch(mode=0o600)


def note_writing(folder: Path | None) -> list[Path]:
    """Make a file that stays behind if this process dies, where there is a folder; return it for `remove_files`."""
    if folder is None:
        return []
    path = folder / f"writing-{os.urandom(8).hex()}"
    note_done(folder, path.name)
    return [path]


def left_writing(folder: Path | None) -> list[Path]:
    """Return the files of those who write, or died writing."""
    return sorted(folder.glob("writing-*")) if folder is not None else []


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files; one that cannot be removed costs a listing of packs later, no more."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_privately(path: Path, data: bytes) -> None:
    """Replace a small file of one's own at once. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.rename(temporary, path)


def _machine_mark() -> bytes:
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        machine = b""
    return blake3(b"backupfs machine" + (machine or os.uname().nodename.encode())).digest()[:16]
