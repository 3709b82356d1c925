"""The repository's config: written once by init, readable without a key, its MAC checked with one.

Bytes: magic (8), then one record
[format, repository id, created_ns, [min, avg, max], compatible, read-compatible, incompatible, mac].
Source: docs/format.rst, "Config".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest

from backupfs.chunking.cutter import CutSizes, can_cut
from backupfs.codec import keys
from backupfs.codec.keys import Keyring
from backupfs.codec.records import Field, decode_record, encode_record
from backupfs.errors import DamagedObject, UnknownVersion

MAGIC = b"BKFSCFG1"
FORMAT = 1
REMEDY = "put it back from a copy of the repository, of any age"  # it is never written again

# Features this program knows. A repository with an unknown incompatible feature is not opened, one with an unknown
# read-compatible feature is not written to; compatible ones may be ignored.
KNOWN_READ_COMPATIBLE: frozenset[str] = frozenset()
KNOWN_INCOMPATIBLE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Config:
    """What every client of a repository must agree on."""

    repository_id: bytes  # 16 random bytes
    created_ns: int
    cut_sizes: CutSizes
    compatible: tuple[str, ...] = ()
    read_compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()

    def fields(self) -> list[Field]:
        """Return the record without its MAC."""
        sizes = self.cut_sizes
        return [
            FORMAT,
            self.repository_id,
            self.created_ns,
            [sizes.min_size, sizes.avg_size, sizes.max_size],
            list(self.compatible),
            list(self.read_compatible),
            list(self.incompatible),
        ]


def encode_config(config: Config, keyring: Keyring) -> bytes:
    """Return the config's bytes, with the MAC of this keyring."""
    fields = config.fields()
    return MAGIC + encode_record([*fields, _mac(fields, keyring)])


def read_config(data: bytes) -> tuple[Config, bytes]:
    """Return (config, its MAC, still unchecked).

    Raises: UnknownVersion for a repository from the future; DamagedObject.
    """
    if data[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise _damaged("it does not start as a config of backupfs")
    if data[: len(MAGIC)] != MAGIC:
        raise UnknownVersion("this repository has a newer format than this backupfs knows: upgrade backupfs")
    try:
        fields = decode_record(data[len(MAGIC) :], "the object config")
    except DamagedObject as error:
        raise DamagedObject(f"{error}; {REMEDY}") from error
    if not fields or not isinstance(fields[0], int):
        raise _damaged("its fields are not those of a config")
    if fields[0] != FORMAT:
        raise UnknownVersion(
            f"this repository has format {fields[0]}, this backupfs knows format {FORMAT}: upgrade backupfs"
        )
    match fields:
        case [
            int(),
            bytes(repository_id),
            int(created_ns),
            [int(low), int(mean), int(high)],
            list(compatible),
            list(read_compatible),
            list(incompatible),
            bytes(mac),
        ]:
            pass
        case _:
            raise _damaged("its fields are not those of format 1")
    if len(repository_id) != 16 or not can_cut(low, mean, high):
        raise _damaged("its values are impossible")
    config = Config(
        repository_id,
        created_ns,
        CutSizes(low, mean, high),
        tuple(str(feature) for feature in compatible),
        tuple(str(feature) for feature in read_compatible),
        tuple(str(feature) for feature in incompatible),
    )
    return config, mac


def _damaged(what: str) -> DamagedObject:
    return DamagedObject(f"the object config is damaged: {what}; {REMEDY}")


def unknown_features(config: Config, added: Iterable[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """Return the features that this program lacks: (those that forbid reading, those that forbid writing).

    added: (class, name) of the features that were added beside the config. A class that is not known forbids both.
    """
    unreadable = set(config.incompatible) - KNOWN_INCOMPATIBLE
    unwritable = set(config.read_compatible) - KNOWN_READ_COMPATIBLE
    for kind, name in added:
        if kind == "read-compatible":
            unwritable |= {name} - KNOWN_READ_COMPATIBLE
        elif kind != "compatible":
            unreadable |= {name} - KNOWN_INCOMPATIBLE
    return unreadable, unwritable


def check_mac(config: Config, mac: bytes, keyring: Keyring) -> bool:
    """Tell whether the config was written by a holder of this keyring."""
    return compare_digest(mac, _mac(config.fields(), keyring))


def _mac(fields: list[Field], keyring: Keyring) -> bytes:
    return keys.keyed_hash(keyring.key(keys.CONFIG, 0), MAGIC + encode_record(fields))
