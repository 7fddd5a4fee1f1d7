"""Forecasts of the timesteps that a model will be given in a run, so that the prologue can run for all steps at once.

The timesteps that a model is given are known only when it is called: pipelines scale, shift and round those of their
scheduler. So every run records the timesteps it is given, as the forecast for later runs with the same scheduler
timesteps.

Hazard: a forecast may be wrong. Where a comparison is free (on a CPU), each step compares. Elsewhere, reading a value
would make the host wait for the device, so a stream that begins with the run uses its forecast unchecked and compares
when it ends, where a difference is an error; any other stream goes without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from harmonica_rt.engine import RunKey
from harmonica_rt.errors import RunError
from harmonica_rt.execute.step_counter import StepCounter
from harmonica_rt.indices import StepIndex

MAX_FORECASTS = 16  # per plan; the least recently learned one is dropped first

Timesteps = tuple[torch.Tensor, ...]  # one per timestep argument


class ForecastKey(NamedTuple):
    """What a forecast is kept under; streams with equal keys share it.

    Attributes:
        run: key of the run; None where no scheduler drives it.
        order: index of the stream among those of its plan: a model may be called twice per step, at other timesteps.
    """

    run: RunKey | None
    order: int


class Forecasts:
    """The forecasts of a plan.

    Args:
        steps: number of steps of a run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._known: OrderedDict[ForecastKey, Timesteps] = OrderedDict()

    def get(self, key: ForecastKey) -> Timesteps | None:
        """The model's timesteps in a stream with this key, `[steps, ...]` each; None where not known."""
        return self._known.get(key)

    def forget(self, key: ForecastKey) -> None:
        """Drop a forecast that was wrong."""
        self._known.pop(key, None)

    def learn(self, key: ForecastKey, timesteps: Timesteps) -> None:
        """Keep the timesteps of a stream as the forecast for the next."""
        self._known[key] = timesteps
        self._known.move_to_end(key)
        while len(self._known) > MAX_FORECASTS:
            self._known.popitem(last=False)


class TimestepLog:
    """The timesteps that a stream is given in a run.

    Args:
        steps: number of steps of a run.

    Attributes:
        rows: `[steps, ...]` for each timestep argument; None before the first call.
    """

    def __init__(self, steps: int) -> None:
        self.rows: Timesteps | None = None
        self._steps = steps

    def begin(self, step: StepIndex, timesteps: Timesteps) -> None:
        """Prepare for a run that begins with `step`. Rows before it are filled too: one batch computes all rows."""
        if self.rows is None:
            with torch.inference_mode(False):
                self.rows = tuple(t.new_empty((self._steps, *t.shape)) for t in timesteps)
        for row, timestep in zip(self.rows, timesteps, strict=True) if step else ():
            row[:step] = timestep

    def write(self, step: StepIndex, timesteps: Timesteps, *, but: torch.device | None = None) -> None:
        """Write down what the model is given in `step`, but for timesteps on the device `but`."""
        for row, timestep in zip(self.rows or (), timesteps, strict=True):
            if timestep.device != but:
                row[step].copy_(timestep)

    def write_at(self, counter: StepCounter, timesteps: Timesteps) -> None:
        """Write down those that lie on the device of `counter`, for the step that it holds."""
        for row, timestep in zip(self.rows or (), timesteps, strict=True):
            if timestep.device == counter.device:
                row.index_copy_(0, counter.tensor, timestep.unsqueeze(0))


class Forecast:
    """The forecast that one stream runs with in one run, and the timesteps that it is given.

    Args:
        forecasts: the forecasts of its plan.
        key: the key of this stream's forecast.
        comparable: whether timesteps can be compared at every step without waiting. Where they cannot, a run without
            scheduler timesteps has no forecast.
        log: where the timesteps are written down, if at a fixed address.

    Attributes:
        comparable, log: as given.
        trusted: True if some step took its values from the forecast without comparing.
    """

    def __init__(
        self, forecasts: Forecasts, key: ForecastKey, *, comparable: bool, log: TimestepLog | None = None
    ) -> None:
        self.comparable = comparable
        self.trusted = False
        self.log = log or TimestepLog(forecasts.steps)
        self._forecasts = forecasts
        self._key = key
        self._first = key.run.first if key.run is not None else StepIndex(0)
        self._foreseen = forecasts.get(key) if comparable or key.run is not None else None
        self._visited: list[int] = []

    def usable_at(self, step: StepIndex) -> Timesteps | None:
        """The forecast for values that are computed in `step`; None if there is none that may be used there."""
        return self._foreseen if step == self._first or self.comparable else None

    def agrees(self, step: StepIndex, timesteps: Timesteps) -> bool:
        """Whether these are the timesteps that were foreseen for `step`. Waits for their device."""
        foreseen = self._foreseen
        return foreseen is not None and all(torch.equal(a[step], b) for a, b in zip(foreseen, timesteps, strict=True))

    def visit(self, step: StepIndex, timesteps: Timesteps) -> None:
        """A step begins, whose timesteps are then written to the log."""
        if not self._visited:
            self.log.begin(step, timesteps)
        self._visited.append(step)

    def end(self) -> None:
        """The run is over: learn its timesteps.

        Raises:
            RunError: the run was computed with other timesteps.
        """
        given, foreseen, rows = self.log.rows, self._foreseen, self._visited
        if given is None or not rows:
            return
        wrong = False
        if self.trusted and foreseen is not None:
            wrong = not all(torch.equal(a[rows], b[rows]) for a, b in zip(foreseen, given, strict=True))
        if wrong:
            self._forecasts.forget(self._key)
        if len(rows) == self._forecasts.steps - self._first:
            self._forecasts.learn(self._key, tuple(timesteps.clone() for timesteps in given))
        if wrong:
            raise RunError(
                "the model got other timesteps than in the previous run with the same scheduler timesteps, and this "
                "run was computed with the old ones: its result is wrong, the next run will be right. A step was left "
                "out or repeated, or the pipeline changes timesteps from run to run"
            )

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it holds."""
        yield from self._foreseen or ()
        yield from self.log.rows or ()
