"""The console that all commands print to, and the message that an error ends a command with.

Hazard: names and paths come from files. A terminal obeys an escape sequence in one of them, and rich takes `[/b]` for
markup. So the consoles interpret no markup and print only what `printable` lets through; styles are given beside the
text, with `line`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.untrusted.text import printable


class _PlainConsole(Console):
    """A console that prints strings as they are: no markup, no emoji codes, nothing that a terminal obeys."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a string printable; all strings pass through here, those in the cells of tables too."""
        return super().render_str(printable(text), **options)


console = _PlainConsole()
_errors = _PlainConsole(stderr=True)
_debug = False


def line(*parts: str | tuple[str, str]) -> Text:
    """Join parts to one text, each a string or a string and its style: `line(("done", "bold"), f": {path}")`."""
    return Text.assemble(*(printable(p) if isinstance(p, str) else (printable(p[0]), p[1]) for p in parts))


def set_debug(wanted: bool) -> None:
    """Show tracebacks of errors and messages of libraries, or stop doing so."""
    global _debug  # a process runs one command
    _debug = wanted


def debugging() -> bool:
    """Whether `--debug` was given."""
    return _debug


def print_unwrapped(text: str | Text) -> None:
    """Print text that someone may copy or a script may parse: it is neither wrapped nor cut."""
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
