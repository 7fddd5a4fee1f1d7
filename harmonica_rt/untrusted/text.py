"""Text from files and names, made safe to print.

The hazard: a terminal obeys what it is sent. A class name in a schedule file that holds an escape sequence can clear
the screen, retitle the window or hide what stands before it; a right-to-left mark can reorder a line. Whatever a file
says goes through `quoted` where a message cites it, and every message through `printable` before it is shown.
"""

from __future__ import annotations

import reprlib
from numbers import Number
from os import PathLike

QUOTED = 120  # characters of a value that a message cites; more says nothing to a reader


def printable(text: str) -> str:
    r"""`text` with every character that does not print written as its escape (`\x1b`); line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def quoted(value: object) -> str:
    """A value as Python would write it, in at most `QUOTED` characters and on one line."""
    return _shorten(printable(_QUOTES.repr(value)).replace("\n", r"\n").replace("\t", r"\t"))


def one_line(text: object, limit: int = QUOTED) -> str:
    """`text` without quotes on a single line, in at most `limit` characters: a name in a table or a title."""
    return _shorten(printable(str(text)).replace("\n", r"\n").replace("\t", r"\t"), limit)


def described(given: object) -> str:
    """What came, in a few words."""
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
    """The `repr` of plain values, cut short while it is made: values may be huge, deep, or share their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, QUOTED, QUOTED

    def repr_int(self, x: int, level: int) -> str:
        """Whole numbers, of any size."""
        if abs(x) >= 10**40:  # Python refuses to write more than 4,300 digits
            return f"<a whole number of {x.bit_length()} bits>"
        return repr(x)

    def repr_instance(self, x: object, level: int) -> str:
        """Other objects by their class alone: their own `repr` may be anything."""
        plain = x is None or isinstance(x, Number | bytes | type)
        return super().repr_instance(x, level) if plain else f"<{type(x).__name__}>"


_QUOTES = _Quotes()
