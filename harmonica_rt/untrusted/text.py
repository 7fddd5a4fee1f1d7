"""Text from files and names, made safe to print.

Hazard: a terminal obeys what it is sent. A class name in a schedule file that holds an escape sequence can clear the
screen, retitle the window or hide the text before it; a right-to-left mark can reorder a line. Content of a file goes
through `quoted` when a message cites it, and every message goes through `printable` before it is shown.
"""

from __future__ import annotations

import reprlib
from numbers import Number
from os import PathLike

QUOTED = 120  # the most characters of a value that a message cites; more would not help a reader


def printable(text: str) -> str:
    r"""`text` with every non-printable character replaced by its escape (`\x1b`); line breaks and tabs are kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def quoted(value: object) -> str:
    """The `repr` of a value, on one line and in at most `QUOTED` characters."""
    return _shorten(printable(_QUOTES.repr(value)).replace("\n", r"\n").replace("\t", r"\t"))


def one_line(text: object, limit: int = QUOTED) -> str:
    """`text` without quotes, on one line and in at most `limit` characters, for a name in a table or a title."""
    return _shorten(printable(str(text)).replace("\n", r"\n").replace("\t", r"\t"), limit)


def described(given: object) -> str:
    """What a value is, in a few words: its `repr` if it is a plain value, otherwise its class."""
    if isinstance(given, type):
        return f"the class {given.__name__} itself"
    if given is None or isinstance(given, bool | int | float | str | bytes | PathLike):
        text = repr(given)
        return text if len(text) <= 80 else f"{text[:77]}..."
    name = type(given).__name__
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _shorten(text: str, limit: int = QUOTED) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _Quotes(reprlib.Repr):
    """The `repr` of plain values, truncated while it is built: values may be huge, deep, or share their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, QUOTED, QUOTED

    def repr_int(self, x: int, level: int) -> str:
        """The `repr` of an integer of any size."""
        if abs(x) >= 10**40:  # Python refuses to write more than 4,300 digits
            return f"<a whole number of {x.bit_length()} bits>"
        return repr(x)

    def repr_instance(self, x: object, level: int) -> str:
        """Only the class name of other objects: their own `repr` may be anything."""
        plain = x is None or isinstance(x, Number | bytes | type)
        return super().repr_instance(x, level) if plain else f"<{type(x).__name__}>"


_QUOTES = _Quotes()
