"""Marks on the rows of an index: one bit a row, so that 100 million chunks are marked in 12 MB."""


class Marks:
    """A set of positions as `Index.locate` gives them; it grows with what is put into it."""

    __slots__ = ("_bits",)

    def __init__(self, count: int = 0) -> None:
        """count: how many positions to make room for at once."""
        self._bits = bytearray(-(-count // 8))

    def add(self, position: int) -> None:
        """Put a position in."""
        byte = position >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(byte + 1 - len(self._bits), 1024)))
        self._bits[byte] |= 1 << (position & 7)

    def __contains__(self, position: int) -> bool:
        byte = position >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (position & 7) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()
