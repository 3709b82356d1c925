"""The smallest system that can be booted: it says one line, on the screen and on the serial port, and waits."""

_BEGIN = bytes.fromhex("fa31c08ed88ec08ed0bc007cfb")  # segments of zero, a stack below the code
# lodsb; test al, al; jz end; mov ah, 14; mov bx, 7; int 0x10; mov al, [si - 1]; mov dx, 0x3f8; out dx, al; jmp begin
_LOOP = bytes.fromhex("ac84c07410b40ebb0700cd108a44ffbaf803eeebeb")
_END = bytes.fromhex("f4ebfd")


def boot_sector(words: bytes) -> bytes:
    """Return the first 440 bytes of a disk that says some words when it is booted."""
    text_at = 0x7C00 + len(_BEGIN) + 3 + len(_LOOP) + len(_END)
    code = _BEGIN + b"\xbe" + text_at.to_bytes(2, "little") + _LOOP + _END + words + b"\0"
    assert len(code) <= 440
    return code.ljust(440, b"\0")
