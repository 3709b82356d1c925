"""Records as canonical msgpack: positional arrays, shortest integers, bytes for names, no floats, no maps."""

from collections.abc import Sequence

import msgpack

from backupfs.errors import DamagedObject

Field = None | bool | int | str | bytes | list["Field"]  # as decoded
Encodable = None | bool | int | str | bytes | Sequence["Encodable"]


def encode_record(fields: Encodable) -> bytes:
    """Return the one byte form of nested lists of None, bool, int, str and bytes."""
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    return data


def decode_record(data: bytes | memoryview, what: str) -> list[Field]:
    """Return the fields of a record, which must be an array and fill `data` to the last byte.

    what: names the record in the message.
    Raises: DamagedObject.
    """
    try:
        fields = msgpack.unpackb(data, raw=False, use_list=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise DamagedObject(f"{what} is not a valid record: {error}") from error
    if not isinstance(fields, list):
        raise DamagedObject(f"{what} is not a valid record: no array")
    return fields
