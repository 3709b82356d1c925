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
        return decode_fields(data)
    except ValueError as error:
        raise DamagedObject(f"{what} is not a valid record: {error}") from error


def decode_fields(data: bytes | memoryview) -> list[Field]:
    """Return the fields of a record, for those who name it only when it is damaged. Raises: ValueError."""
    try:
        fields = msgpack.unpackb(data, raw=False, use_list=True)
    except (msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(fields, list):
        raise ValueError("no array")
    return fields
