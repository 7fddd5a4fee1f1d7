"""The engine of a fit: the reference, which asks for the truth before it reuses anything.

At a step that reuses sites, the plain model first runs the same call. What its sites return is what the weighted sums
should give: the weights are fitted to it and to what earlier calls showed, and the step is then run with them. So the
run goes on from the forecast, as it will in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from harmonica_rt.call.call import Call
from harmonica_rt.fitting.moment_table import EntryWeights, MomentTable
from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.model.watch import ModelWatch
from harmonica_rt.reference_engine import ReferenceEngine, ReferenceStream
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.sites import check_sites


class FittingEngine(ReferenceEngine):
    """Runs a schedule and fits `table` to what it meets.

    Args:
        model: the denoiser.
        schedule: has weights for every value that an entry is to take, so that no stream reuses an entry before it
            holds all of them. Only which values these are counts, not the weights.
        table: learns from all streams.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, table: MomentTable) -> None:
        super().__init__(model, schedule)
        self._table = table
        self._rows: dict[StepIndex, int] = {}

    @property
    def samples(self) -> int:
        """Rows of the batches that a step was fitted to, over all calls: two per image where guidance doubles them."""
        return max(self._rows.values(), default=0)

    def new_stream(self, call: Call) -> FittingStream:
        """See `Engine.new_stream`."""
        check_sites(self._model, self._schedule.sites)
        return FittingStream(self._model, self._schedule, self._watch, self._table, self._rows)


class FittingStream(ReferenceStream):
    """A stream that fits the weights of each step before it runs the step."""

    def __init__(
        self, model: nn.Module, schedule: Schedule, watch: ModelWatch, table: MomentTable, rows: dict[StepIndex, int]
    ) -> None:
        super().__init__(model, schedule, watch)
        self._table = table
        self._rows = rows
        self._fitted: dict[SiteIndex, EntryWeights] = {}  # of the current step

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        reused = [] if catch_up else [SiteIndex(int(site)) for site in np.flatnonzero(~self._schedule.compute[step])]
        if reused:
            _, truth = self._forward(call, {})
            for site in reused:
                values = self._values(step, site, int(self._table.values[step, site]))
                self._table.learn(step, site, truth[site], values)
            self._rows[step] = self._rows.get(step, 0) + _batch(call)
            self._fitted = self._table.weights(step)
        return super().run(step, call, catch_up=catch_up)

    def _weights(self, step: StepIndex, site: SiteIndex) -> EntryWeights:
        return self._fitted[site]


def _batch(call: Call) -> int:
    """The rows of a call's first tensor, the latents."""
    return next((leaf.shape[0] for leaf in call.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)
