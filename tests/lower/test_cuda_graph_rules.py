"""What a CUDA graph cannot hold, told from fake tensors on devices that this machine need not have."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.lower.cuda_graph_rules import obstacle
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.plan.step_graph import StepGraph, TabledGraph
from tests.models import stack, stack_call

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def step() -> StepGraph:
    """The step graph of a model that lies on `cuda:0` as a whole."""
    model = stack()
    captured = capture(model, CallConvention(model).normalise((), stack_call(0)), find_sites(model))
    step = build_plan(captured, Schedule.all_compute(steps=2, sites=find_sites(model))).programs[0]
    move(step, FIRST)
    return step


def move(step: StepGraph, device: torch.device, after: int = 0) -> None:
    """Say that the nodes from the given one on lie on another device."""
    with FakeTensorMode():
        for node in list(step.graph.nodes)[after:]:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def test_one_gpu_is_no_obstacle(step: StepGraph) -> None:
    assert obstacle(step, FIRST) is None


def test_a_model_over_two_gpus_is(step: StepGraph) -> None:
    move(step, SECOND, after=len(step.graph.nodes) - 3)
    for recorded_on in (FIRST, SECOND):
        reason = obstacle(step, recorded_on)
        assert reason is not None
        assert "a graph holds the work of one device" in str(reason)


def test_another_gpu_than_the_pools_is(step: StepGraph) -> None:
    move(step, SECOND)
    assert "lies on cuda:1, other values on cuda:0" in str(obstacle(step, FIRST))


@pytest.mark.parametrize(("classes", "refused"), [((7,), False), ((), True)], ids=["given", "counted"])
def test_one_hot_needs_its_number_of_classes(classes: tuple[int, ...], refused: bool) -> None:
    graph = fx.Graph()
    labels = graph.placeholder("labels")
    hot = graph.call_function(torch.ops.aten.one_hot.default, (labels, *classes))
    graph.output((hot,))
    with FakeTensorMode():
        labels.meta["val"] = torch.empty(2, dtype=torch.int64, device=FIRST)
        hot.meta["val"] = torch.empty(2, 7, dtype=torch.int64, device=FIRST)
    reason = obstacle(TabledGraph(graph, (), (), (0,)), FIRST)
    assert (reason is not None) is refused
