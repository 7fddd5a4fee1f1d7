"""The console that all commands print to, and how an error ends a command.

The hazard: names and paths come from files. To a terminal an escape sequence in one of them is an order, and to rich
`[/b]` in one is markup. So the consoles know no markup, and print nothing but what `printable` lets through; styles are
given beside the text, with `line`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.untrusted.text import printable


class _PlainConsole(Console):
    """Strings are printed as they are: no markup, no emoji codes, nothing that a terminal obeys."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """All strings come through here, those in the cells of tables too."""
        return super().render_str(printable(text), **options)


console = _PlainConsole()
_errors = _PlainConsole(stderr=True)
_debug = False


def line(*parts: str | tuple[str, str]) -> Text:
    """Text of several parts, each a string, or a string and its style: `line(("done", "bold"), f": {path}")`."""
    return Text.assemble(*(printable(p) if isinstance(p, str) else (printable(p[0]), p[1]) for p in parts))


def set_debug(wanted: bool) -> None:
    """Let errors end in a traceback, and libraries speak."""
    global _debug  # one process is one command
    _debug = wanted


def debugging() -> bool:
    """Whether `--debug` was given."""
    return _debug


def unwrapped(text: str | Text) -> None:
    """Print what someone may copy or a script may read: names and paths are neither wrapped nor cut."""
    console.print(text, soft_wrap=True)


def tell(text: str) -> None:
    """Print text to standard error, neither wrapped nor cut."""
    _errors.print(text, soft_wrap=True)


def fail(error: HarmonicaError | OSError) -> int:
    """Print an error as one message and return the exit status."""
    if _debug:
        raise error
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, HarmonicaError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    _errors.print(line(("error:", "bold red"), f" {text}"), soft_wrap=True)
    return 2
