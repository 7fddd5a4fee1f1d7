"""What the fuzzer knows about a format, and damage that fits every format: bytes changed at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random


def _anything(result: object, path: Path) -> None:
    """Accept any result."""


@dataclass(frozen=True)
class Format:
    """A kind of file and its reader.

    Attributes:
        name: name of the format, as `--format` takes it.
        file: name of the file that is written.
        errors: the errors that the reader documents.
        valid: makes the bytes of a file that must be read.
        damaged: makes the bytes of a file derived from a valid one, which may be read or refused.
        read: the public reader, with everything that it needs besides the file (a model, sites).
        check: raises if a result is unfit for use: it does not survive being saved, prints control characters, or
            differs from what the file says.
    """

    name: str
    file: str
    errors: tuple[type[Exception], ...]
    valid: Callable[[Random], bytes]
    damaged: Callable[[Random], bytes]
    read: Callable[[Path], object]
    check: Callable[[object, Path], None] = _anything


_ODD_BYTES = (b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"\r\n", b"\x80" * 9)


def garbled(rng: Random, data: bytes) -> bytes:
    """`data` cut short, or with some bytes flipped, taken out, put in, doubled or moved."""
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 8, 64, 1000)), len(data) - at)
        match rng.randrange(7):
            case 0:
                data = data[:at]
            case 1 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[:at] + rng.choice(_ODD_BYTES) + data[at:]
            case 4:
                data = data[: at + length] + data[at:]
            case 5:
                data = data[:at] + rng.randbytes(length) + data[at + length :]
            case 6:
                data = data[at:] + data[:at]
    return data
