"""The reference: the plain model, run eagerly, with the outputs of reused sites replaced. No graph, no plan.

It is the truth that compiled programs are compared with, and it runs where a model cannot be captured. So it favours
being obviously right over being fast: cached values are cloned when stored and when returned, in case the model later
changes them in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.capture.sites import check_site_result
from harmonica_rt.changes import Changes, in_this_thread
from harmonica_rt.engine import RunKey
from harmonica_rt.errors import SiteError
from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.use import run_untraced
from harmonica_rt.model.watch import ModelState, ModelWatch
from harmonica_rt.schedule import Schedule
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
    """A stream with the latest outputs of each site: of all its calls in one forward, as a module may run twice.

    Attributes:
        cache: site -> the outputs of the latest step that computed it.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, watch: ModelWatch) -> None:
        self._model = model
        self._schedule = schedule
        self._watch = watch
        self.cache: dict[SiteIndex, list[Any]] = {}
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
        fresh: dict[SiteIndex, list[Any]] = {}
        changes = Changes()
        with changes, changes:
            run_untraced(self._model, changes)
            _replace_sites(self._model, self._schedule.sites, given, fresh, changes)
            output = own_forward(self._model)(**call.kwargs)
        self.cache.update({site: outputs for site, outputs in fresh.items() if outputs})
        if self._schedule.weights is not None:
            for site, outputs in fresh.items():
                self._history.setdefault(site, {})[step] = outputs
        self._watch.accept()  # tables that the model itself built in this call do not count as a change
        return output

    def _given(self, step: StepIndex, site: SiteIndex) -> list[Any]:
        """What the calls of a reused site return in a step."""
        weights = self._schedule.entry_weights[step, site]
        used = [age for age, weight in enumerate(weights) if weight != 0.0]
        if used == [0] and weights[0] == 1.0:
            return self.cache.get(site, [])
        computed = np.flatnonzero(self._schedule.compute[:step, site])[::-1]
        values = [self._history[site][int(computed[age])] for age in used]
        return [_weighted_sum(outputs, [float(weights[age]) for age in used]) for outputs in zip(*values, strict=True)]


def _replace_sites(
    model: nn.Module,
    sites: tuple[str, ...],
    given: dict[SiteIndex, list[Any]],
    fresh: dict[SiteIndex, list[Any]],
    changes: Changes,
) -> None:
    """Until `changes` are undone, calls of reused sites return what is `given`, and those of others go to `fresh`.

    Torch runs a module's `_compiled_call_impl`, if it has one, in place of its hooks and its forward.
    """
    for index, name in enumerate(sites):
        site, module = SiteIndex(index), model.get_submodule(name)
        plain = module.__dict__.get("_compiled_call_impl") or module._call_impl
        if site in given:
            call: Callable[..., Any] = _Reused(given[site])
        else:
            call = _Recorded(module, fresh.setdefault(site, []), plain)
        changes.set(module.__dict__, "_compiled_call_impl", in_this_thread(call, plain))


class _Reused:
    """Stands in for a site's call: the k-th call in a forward returns the k-th cached output."""

    def __init__(self, outputs: list[Any]) -> None:
        self._outputs = iter(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for output in self._outputs:
            return _cloned(output)
        raise SiteError("a site ran more often in this forward than in the one that stored its outputs")


class _Recorded:
    """Runs a site and keeps a copy of what it returns."""

    def __init__(self, module: nn.Module, kept: list[Any], call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call
        self._kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._call(*args, **kwargs)
        check_site_result(self._module, args, kwargs, output)
        self._kept.append(_cloned(output))
        return output


def _weighted_sum(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """`sum_j weights[j] * outputs[j]` in fp32 (fp64 for fp64), rounded once."""

    def total(*values: Any) -> Any:
        if not isinstance(values[0], torch.Tensor):
            return values[0]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        terms = [value.to(wide) * weight for value, weight in zip(values, weights, strict=True)]
        return functools.reduce(torch.add, terms).to(values[0].dtype)

    return pytree.tree_map(total, *outputs)


def _cloned(output: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, output)
