"""Which features a stream of a run holds, and which of them the schedule reuses.

Hazard: a stream that missed a step lacks the features of that step, and a feature of an earlier one is stale. A stale
feature would ruin the image, so a stream reuses only what it stored itself at the step that the schedule names.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.call.call import Call, Signature
from harmonica_rt.engine import Stream
from harmonica_rt.indices import StepIndex
from harmonica_rt.plan.histories import histories
from harmonica_rt.sampling.conditioning import Conditioning
from harmonica_rt.schedule import Schedule


@dataclass(frozen=True, eq=False)
class StepTables:
    """What a schedule says about each step.

    Attributes:
        compute: bool `[steps, sites]`.
        source: int `[steps, sites]`, the step whose value a site that is reused as it is takes; -1 elsewhere.
        reused: how many sites each step reuses.
        summed: for each step, the `(step, site)` pairs of the values that its weighted sums take, two index arrays.
    """

    compute: NDArray[np.bool_]
    source: NDArray[np.int64]
    reused: tuple[int, ...]
    summed: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.compute)

    @property
    def sites(self) -> int:
        """The number of sites."""
        return int(self.compute.shape[1])


@functools.lru_cache(maxsize=64)
def step_tables(schedule: Schedule) -> StepTables:
    """The tables of a schedule."""
    history = histories(schedule)
    weighted = history.taken > 0
    summed = []
    for taken in history.steps:
        sites, ages = np.nonzero((taken >= 0) & weighted[:, None])
        summed.append((taken[sites, ages], sites))
    source = np.where(weighted, -1, history.steps[:, :, 0])
    return StepTables(schedule.compute, source, tuple((~schedule.compute).sum(axis=1).tolist()), tuple(summed))


class RunStream:
    """A stream of a run, with its conditioning and a record of which step's features it holds.

    A *regular* stream has run every step so far as scheduled, so the schedule says what it holds, and nothing is
    recorded: that is the fast path of nearly all calls. Once it misses a step, the step of each site is kept.

    Attributes:
        stream: the engine's stream.
        model_state: the state of the model that its features were computed with.
        signature: the signature of its calls.
        order: the number of calls before its own in a step, at the last change of its conditioning.
        last_step: the last step that it ran, or -1.
        conditioning: what its calls have in common.
    """

    def __init__(self, stream: Stream, call: Call, order: int, tables: StepTables, model_state: object) -> None:
        self.stream = stream
        self.model_state = model_state
        self.signature: Signature = call.signature
        self.last_step = -1
        self.conditioning = Conditioning(call)
        self._tables = tables
        self.begin(call, order)

    def begin(self, call: Call, order: int) -> None:
        """Discard everything stored: `call` is the first with new conditioning."""
        self.conditioning.end()
        self.order = order
        self.stream.begin()
        self.conditioning = Conditioning(call)
        self._regular = self.last_step == -1
        self._held = np.zeros_like(self._tables.compute)  # if not regular: [steps, sites], what it has computed

    def lacks_features(self, step: StepIndex, before: int) -> bool:
        """Whether `step` would reuse features that the stream, whose last step was `before`, does not hold."""
        if self._regular and before == step - 1:
            return False
        if self._regular:
            self._regular = False
            self._held[: before + 1] = self._tables.compute[: before + 1]
        latest = np.where(self._held, np.arange(self._tables.steps)[:, None], -1).max(axis=0)
        return bool((latest < self._tables.source[step]).any() or not self._held[self._tables.summed[step]].all())

    def spoil(self, before: int) -> None:
        """Discount its last step, which was run for a model that had changed; it continues after step `before`."""
        self.last_step = before
        self._regular = False
        self._held[:] = False

    def ran(self, step: StepIndex, *, all_sites: bool) -> None:
        """Record that it ran `step`, as scheduled or with all sites computed."""
        if not self._regular:
            self._held[step] = True if all_sites else self._tables.compute[step]
