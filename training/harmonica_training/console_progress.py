"""Shows the progress of a training in a terminal: a bar, or lines where no bar can be drawn."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from harmonica_training.progress import IterationRecord, Silent

PLAIN_LINES = 20  # about how many lines a training prints where no bar can be drawn


class ConsoleProgress(Silent):
    """A bar with the remaining time and the figures; without a terminal, about `PLAIN_LINES` lines in total.

    Args:
        console: where to show it; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._total = self._done = 0
        self._every = 1  # iterations per plain line
        self._begun = 0.0

    def begin(self, total: int, done: int) -> None:
        """Say where a training continues, and draw the bar if there is a terminal to draw in."""
        self.end()
        if done:
            text = f"continuing after iteration {done} of {total}"
            if done >= total:
                text = f"{done} iterations are done already, and {total} are asked for: nothing is left to learn"
            self._console.print(text, highlight=False)
        self._total, self._done, self._begun = total, done, time.monotonic()
        self._every = max(1, math.ceil((total - done) / PLAIN_LINES))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))  # in a narrow terminal, the bar shrinks
            figures = TextColumn("{task.description}")
            self._bar = RichProgress(count, BarColumn(bar_width=None), figures, console=self._console)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def iteration(self, record: IterationRecord) -> None:
        """Advance the bar, or print a line if one is due."""
        if self._bar is not None:
            (task,) = self._bar.task_ids
            self._bar.update(task, completed=record.iteration, description=self._figures(record))
        elif (record.iteration - self._done) % self._every == 0 or record.iteration == self._total:
            line = f"iteration {record.iteration}/{self._total}  {self._figures(record)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Stop the bar, leaving it as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, record: IterationRecord) -> str:
        # From the wall clock, not `seconds`: renewing lambda takes time as well.
        each = (time.monotonic() - self._begun) / max(1, record.iteration - self._done)
        left = _duration(each * (self._total - record.iteration))
        return (
            f"{left} left  loss {record.loss:.4g}  CUR {record.cur:.1%}  speed-up {record.speedup:.2f}x  "
            f"beta {record.beta:.3g}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
