"""The console that all commands print to, and how an error ends a command.

The consoles know no markup, because names and paths come from files and `[/b]` is a good name; styles are given beside
the text, with `line`.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from harmonica_rt.errors import HarmonicaError

console = Console(highlight=False, markup=False, emoji=False)
_errors = Console(stderr=True, highlight=False, markup=False, emoji=False)
_debug = False


def set_debug(wanted: bool) -> None:
    """Let errors end in a traceback, and libraries speak."""
    global _debug  # one process is one command
    _debug = wanted


def debugging() -> bool:
    """Whether `--debug` was given."""
    return _debug


def line(*parts: str | tuple[str, str]) -> Text:
    """Text of several parts, each a string, or a string and its style: `line(("done", "bold"), f": {path}")`."""
    return Text.assemble(*parts)


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
