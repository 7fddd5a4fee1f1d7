"""A GPU of fake tensors: models and calls that lie on `cuda:0`, captured, planned and lowered as on a real one.

Values are never computed, so any model fits, at its real size. Operators check shapes, dtypes and devices: one that a
GPU would refuse for mixed devices fails here too. Needs `guard.load()`.

What differs from a real GPU: `torch.tensor(..., device="cuda")` within a forward is traced as a constant on the CPU and
a copy of it, since no real tensor can lie on `cuda:0` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.capture import capture, trace
from harmonica_rt.capture.closed_values import fold_closed_values
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.schedule import Schedule
from tests.fake_cuda.valued import DEVICE, Valued


class FakeGpu:
    """Where fake tensors live. Tensors of two of them cannot meet in one operator."""

    def __init__(self) -> None:
        # without a ShapeEnv, sizes that depend on values cannot be traced; other sizes are numbers
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)

    def take(self, values: Any) -> Any:
        """Nested values with every tensor on `cuda:0`, a fake one of the same layout."""
        return pytree.tree_map_only(torch.Tensor, self._tensor, values)

    def build(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """A model of any size, made without values and moved as by `move`, in eval mode."""
        with torch.device("meta"):
            return self.move(make().eval(), dtype)

    def move(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Put parameters and buffers on `cuda:0`, as `model.to("cuda", dtype)`; other tensors stay where they are."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = self._tensor(parameter.detach(), dtype)
                    module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else self._tensor(buffer, dtype)
        return model

    def plan(self, model: nn.Module, arguments: Mapping[str, Any], schedule: Schedule) -> tuple[Plan, tuple[Role, ...]]:
        """The plan of a model on `cuda:0` for calls with these arguments, and the roles of their leaves."""
        call = self.call(model, arguments)
        with_values = CallConvention(model).normalise((), arguments).leaves
        call = replace(call, leaves=pytree.tree_map_only(torch.Tensor, Valued, with_values))
        run_once = mock.patch.object(trace, "_run_once", self._run_once)
        with run_once, mock.patch.object(capture, "fold_closed_values", self._fold):
            plan = build_plan(capture.capture(model, call, schedule.sites), schedule)
        check_plan(plan)
        return plan, roles(call)

    def call(self, model: nn.Module, arguments: Mapping[str, Any]) -> Call:
        """A call of the model with these arguments on `cuda:0`."""
        return CallConvention(model).normalise((), self.take(dict(arguments)))

    def _run_once(self, model: nn.Module, call: Call) -> None:
        """What capture does with a model that may build tables at its first call."""
        with self.mode, torch.no_grad():
            model(**call.kwargs)

    def _fold(self, *arguments: Any) -> Any:
        """What capture does with values that depend on nothing: computed on the CPU, and moved to `cuda:0`."""
        with self.mode:
            return fold_closed_values(*arguments)

    def _tensor(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=DEVICE)
