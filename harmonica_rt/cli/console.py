"""The console that all commands print to, and how an error ends a command."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from harmonica_rt.errors import HarmonicaError

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)
_traceback = False


def show_traceback(wanted: bool) -> None:
    """Let errors end in a traceback."""
    global _traceback  # one process is one command
    _traceback = wanted


def fail(error: HarmonicaError | OSError) -> int:
    """Print an error as one message and return the exit status."""
    if _traceback:
        raise error
    _errors.print(f"[bold red]error:[/] {escape(str(error))}")
    return 2
