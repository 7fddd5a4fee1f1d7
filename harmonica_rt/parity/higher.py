"""The reference in the next higher precision: the ground truth for measured errors.

Hazard: a copy made when a run begins would miss what a callback changes mid-run, just as a stale plan does, and so
hide the error. The model is therefore copied anew at each call.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_rt.call.call import Call
from harmonica_rt.engine import RunKey
from harmonica_rt.indices import StepIndex
from harmonica_rt.model.watch import ModelState, ModelWatch
from harmonica_rt.parity.promoted import Promoted
from harmonica_rt.parity.tolerance import one_up
from harmonica_rt.reference_engine import ReferenceStream
from harmonica_rt.schedule import Schedule


class HigherEngine:
    """The reference in the next higher precision, as an engine; outputs are rounded to the model's precision."""

    looks_late = False

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self._model = model
        self._schedule = schedule
        self._watch = ModelWatch(model)

    def state(self, call: Call) -> ModelState:
        """See `Engine.state`."""
        return self._watch.look()

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> None:
        """See `Engine.begin_run`."""
        self._schedule = schedule or self._schedule
        self._watch.begin_run()

    def new_stream(self, call: Call) -> HigherStream:
        """A new stream with nothing stored."""
        return HigherStream(self._model, self._schedule, rounded=True)


class HigherStream(ReferenceStream):
    """A stream of the reference in the next higher precision; the model is copied and promoted anew at each call.

    Args:
        model: the model.
        schedule: what to reuse at each step.
        rounded: whether outputs are rounded to the model's precision. They are in a run by itself, where a pipeline
            takes them; in lockstep they are only compared.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, rounded: bool = False) -> None:
        super().__init__(model, schedule, ModelWatch(model))
        self._original = model
        self._rounded = rounded

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        low = dtype_of(self._original)
        high = one_up(low)
        self._model = _promoted_copy(self._original, high)
        try:
            with Promoted(low, high):
                output = super().run(step, _promoted_call(call), catch_up=catch_up)
        finally:
            self._model = self._original
        if self._rounded:
            return pytree.tree_map_only(torch.Tensor, lambda t: t.to(low) if t.dtype is high else t, output)
        return output


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


def _promoted_copy(model: nn.Module, high: torch.dtype) -> nn.Module:
    plain = [p for p in model.parameters() if p.dtype.is_floating_point and not is_traceable_wrapper_subclass(p)]
    # so that parameters are only converted, not copied first
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(high), requires_grad=False) for p in plain}
    # torch's own `to`: that of diffusers' models warns about casts that would degrade results
    return nn.Module.to(copy.deepcopy(model, memo), high).eval()


def _promoted_call(call: Call) -> Call:
    def up(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(one_up(tensor.dtype)) if tensor.dtype.is_floating_point else tensor

    return dataclasses.replace(call, kwargs=pytree.tree_map_only(torch.Tensor, up, call.kwargs))
