"""The console that all commands print to, and how an error ends a command."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from harmonica_rt.errors import HarmonicaError

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)
_debug = False


def set_debug(wanted: bool) -> None:
    """Let errors end in a traceback, and libraries speak."""
    global _debug  # one process is one command
    _debug = wanted


def debugging() -> bool:
    """Whether `--debug` was given."""
    return _debug


def fail(error: HarmonicaError | OSError) -> int:
    """Print an error as one message and return the exit status."""
    if _debug:
        raise error
    _errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    return 2
