"""Runs plans step by step on fake tensors of `cuda:0`, as an engine does on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.engine import RunKey
from harmonica_rt.execute import launch_order
from harmonica_rt.execute.cuda_graphs import Graphs
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.indices import StepIndex
from tests.fake_cuda.gpu import DEVICE, FakeGpu


def run(
    gpu: FakeGpu, lowered: LoweredPlan, model: nn.Module, arguments: Mapping[str, Any], graphs: Graphs | None = None
) -> tuple[Any, ...]:
    """The tensors that the last step of a third run returns; the first learns the timesteps.

    With graphs, step programs are recorded in the second run and the prologue in the third. There are no CUDA streams,
    so launches are in order. Later runs do not end: they would compare timesteps, and fake ones have no values.
    """
    call = gpu.call(model, arguments)
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    steps = len(lowered.plan.steps)
    key = RunKey(tuple(map(float, range(steps, 0, -1))))
    with gpu.mode, torch.no_grad(), mock.patch.object(launch_order, "has_streams", return_value=False):
        runtime = PlanRuntime(lowered, lambda: parameters, DEVICE, graphs=graphs, debug=False)
        for number in range(3):
            runtime.begin_run(key)
            stream = runtime.new_stream()
            stream.begin()
            for step in range(steps):
                outputs = stream.run(StepIndex(step), call, catch_up=False)
            if number == 0:
                stream.end()
    return tuple(pytree.tree_leaves(outputs))
