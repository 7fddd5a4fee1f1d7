"""Streams that run the model itself, with the values of earlier steps in the place of reused sites."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.changes import Changes
from harmonica_rt.engine import RunKey
from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.use import run_untraced
from harmonica_rt.model.watch import ModelState, ModelWatch
from harmonica_rt.reference_engine.site_calls import cloned, replace_sites
from harmonica_rt.reference_engine.spans import BlockShape
from harmonica_rt.schedule import OUTPUT, Schedule
from harmonica_rt.schedule.sites import check_sites


class ReferenceEngine:
    """Makes streams that run `model` itself; `watch` is the existing watch of that model, if there is one."""

    looks_late = False

    def __init__(self, model: nn.Module, schedule: Schedule, watch: ModelWatch | None = None) -> None:
        self._model = model
        self._schedule = schedule
        self._watch = watch or ModelWatch(model)

    def state(self, call: Call) -> ModelState:
        """See `Engine.state`."""
        return self._watch.look()

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> None:
        """Nothing is kept between runs."""
        self._schedule = schedule or self._schedule
        self._watch.begin_run()

    def new_stream(self, call: Call) -> ReferenceStream:
        """A stream with nothing stored.

        Raises:
            SiteError: the model has lost a site.
        """
        check_sites(self._model, self._schedule.sites)
        return ReferenceStream(self._model, self._schedule, self._watch)


class ReferenceStream:
    """A stream with the latest values of each site: of all its calls in one forward, as a module may run twice.

    Attributes:
        cache: site -> its values (see `site_calls`) in the latest step that computed it.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, watch: ModelWatch) -> None:
        self._model = model
        self._schedule = schedule
        self._watch = watch
        self.cache: dict[SiteIndex, list[Any]] = {}
        self._output = SiteIndex(0) if OUTPUT in schedule.sites else None  # then it is the only site
        self._shapes: dict[SiteIndex, list[BlockShape]] = {}
        given = schedule.entry_weights
        self._weighted = (given[..., 1:] != 0.0).any(axis=(0, 2)) | ~np.isin(given[..., 0], (0.0, 1.0)).all(axis=0)
        self._history: dict[SiteIndex, dict[int, list[Any]]] = {}  # site -> step -> outputs, the latest last

    def begin(self) -> None:
        """See `Stream.begin`."""
        self.cache.clear()
        self._history.clear()

    def end(self) -> None:
        """See `Stream.end`; nothing was assumed, so there is nothing to check."""

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        row = self._schedule.compute[step]
        reuse = set() if catch_up else {SiteIndex(i) for i, computed in enumerate(row) if not computed}
        given = {site: self._given(step, site) for site in reuse}
        output, fresh = self._forward(call, given)
        self.cache.update({site: outputs for site, outputs in fresh.items() if outputs})
        if self._schedule.weights is not None:
            self._remember(step, fresh)
        self._watch.accept()  # tables that the model itself built in this call do not count as a change
        return output

    def _forward(self, call: Call, given: dict[SiteIndex, list[Any]]) -> tuple[Any, dict[SiteIndex, list[Any]]]:
        """The model's output with these values of reused sites, and the values of all other sites."""
        fresh: dict[SiteIndex, list[Any]] = {}
        if self._output in given:
            return cloned(given[self._output][0]), fresh
        changes = Changes()
        with changes, changes:
            run_untraced(self._model, changes)
            replace_sites(self._model, self._schedule.sites, given, fresh, self._shapes, changes)
            output = own_forward(self._model)(**call.kwargs)
        if self._output is not None:
            fresh[self._output] = [cloned(output)]
        return output, fresh

    def _remember(self, step: StepIndex, fresh: dict[SiteIndex, list[Any]]) -> None:
        """Keep the latest values that the schedule computes, as many as an entry may take."""
        for site, outputs in fresh.items():
            if self._schedule.compute[step, site]:
                kept = self._history.setdefault(site, {})
                kept[step] = outputs
                if len(kept) > self._schedule.most_weights:
                    del kept[min(kept)]

    def _given(self, step: StepIndex, site: SiteIndex) -> list[Any]:
        """What the calls of a reused site return in a step.

        A site without weights returns its latest value. A stream that caught up may have computed that value at a step
        where the schedule reuses the site. A site with weights uses only values from steps that the schedule computes.
        """
        if not self._weighted[site]:
            return self.cache.get(site, [])
        weights = self._weights(step, site)
        count = int(np.flatnonzero(weights)[-1]) + 1
        values = self._values(step, site, count)
        if count == 1 and weights[0] == 1.0:
            return values[0]
        return [_weighted_sum(outputs, weights[:count].tolist()) for outputs in zip(*values, strict=True)]

    def _weights(self, step: StepIndex, site: SiteIndex) -> NDArray[np.float64]:
        """The weights of an entry, newest value first."""
        weights: NDArray[np.float64] = self._schedule.entry_weights[step, site]
        return weights

    def _values(self, step: StepIndex, site: SiteIndex, count: int) -> list[list[Any]]:
        """The latest `count` values that the schedule computes before a step, newest first."""
        computed = np.flatnonzero(self._schedule.compute[:step, site])[::-1]
        return [self._history[site][int(source)] for source in computed[:count]]


def _weighted_sum(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """`sum_j weights[j] * outputs[j]` in fp32 (fp64 for fp64), rounded once."""

    def total(*values: Any) -> Any:
        if not isinstance(values[0], torch.Tensor):
            return values[0]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        terms = [value.to(wide) * weight for value, weight in zip(values, weights, strict=True)]
        return functools.reduce(torch.add, terms).to(values[0].dtype)

    return pytree.tree_map(total, *outputs)
