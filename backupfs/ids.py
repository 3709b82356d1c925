"""Names of things: 32 bytes each, shown as hex; short forms for people."""

from typing import NewType

ID_SIZE = 32

ChunkId = NewType("ChunkId", bytes)  # keyed BLAKE3 of the chunk's plain bytes
ObjectId = NewType("ObjectId", bytes)  # plain BLAKE3 of an immutable object's stored bytes
SnapshotId = NewType("SnapshotId", bytes)  # the ObjectId of a snapshot

SHORT_HEX = 8


def short(identity: bytes) -> str:
    """Return the first hex digits of an id, as messages and listings show it."""
    return identity.hex()[:SHORT_HEX]
