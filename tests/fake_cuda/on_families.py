"""Each family on a fake `cuda:0`: captured, planned, lowered and run. `test_fake_cuda.py` runs these in a process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.execute import lowered_plan
from harmonica_rt.execute.slot_buffers import SlotBuffers
from harmonica_rt.graph.facts import device_of
from harmonica_rt.plan.plan import build_plan
from tests.fake_cuda import guard
from tests.fake_cuda.gpu import FakeGpu
from tests.fake_cuda.planned import STEPS, Planned, planned
from tests.fake_cuda.runs import run
from tests.fake_cuda.valued import DEVICE
from tests.plain_pool import PlainPool
from tests.tiny import built, families

guard.load()

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

# The most that a full step and a step that reuses every site may launch: plain, then fused.
FAMILIES = {
    "dit": ((103, 67), (23, 5)),
    "pixart-alpha": ((92, 36), (31, 5)),
    "sd3": ((256, 48), (67, 7)),
    "flux": ((264, 74), (68, 11)),
}


class Seen(Exception):
    """Ends a run as soon as the first call of the model is known."""


def first_call(pipeline: Any, **arguments: Any) -> dict[str, Any]:
    """The arguments that a pipeline first calls its transformer with."""
    seen: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(CallConvention(module).normalise(args, kwargs).kwargs)
        raise Seen

    hook = pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen):
        pipeline(num_inference_steps=STEPS, output_type="np", **arguments)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Planned]:
    made = families()[request.param]
    pipeline = built(made.build)
    arguments = first_call(pipeline, **made.guided)
    gpu = FakeGpu()
    return request.param, planned(gpu, gpu.move(pipeline.transformer), arguments)


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_nothing_refuses_a_graph(family: tuple[str, Planned], lowering: str) -> None:
    assert family[1].refusals(lowering) == []


def test_everything_lies_on_the_gpu(family: tuple[str, Planned]) -> None:
    _, found = family
    assert {device_of(node) for node in found.plan.captured.graph.nodes} <= {DEVICE, None}
    with found.gpu.mode:
        buffers = SlotBuffers(found.plan)
    assert {device: arena.nbytes for device, arena in buffers.arenas.items()} == found.plan.table.arena_bytes
    assert set(buffers.arenas) == {DEVICE}


@pytest.mark.parametrize(("lowering", "graphs"), [("plain", False), ("fused", True)])
def test_runs(family: tuple[str, Planned], lowering: str, graphs: bool) -> None:
    """Every operator takes its arguments where they lie; with graphs, both programs and the prologue are recorded."""
    _, found = family
    pool = PlainPool(device=DEVICE)
    lowered = found.lowered(lowering)
    outputs = run(found.gpu, lowered, found.model, found.arguments, pool.graphs if graphs else None)
    expected = [node.meta["val"] for node in found.plan.captured.output.args[0]]
    assert [(o.device, o.shape, o.dtype) for o in outputs] == [(DEVICE, e.shape, e.dtype) for e in expected]
    batches = lowered.prologue is not None and bool(lowered.prologue.each.part.results)
    assert lowered.prologue is None or lowered.prologue.batches
    assert pool.recorded == (graphs and 2 + 2 * batches)  # two programs; the prologue of a step, and of a run


# Layers per product. Values of a joint attention are joined with those of the text by a copy, so they stay single; the
# text of the first block does not depend on the latents.
JOINED = {"dit": [3, 3], "pixart-alpha": [3, 3], "sd3": [3, 2, 2, 2, 2, 2], "flux": [3, 3, 2, 2, 2]}


def products(graph: fx.Graph) -> list[int]:
    """Into how many parts each linear layer's result is split, where it is."""
    aten = torch.ops.aten
    splits = graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    return sorted((len(node.args[1]) for node in splits if node.args[0].target is aten.linear.default), reverse=True)


def test_layers_of_one_input_are_one_product(family: tuple[str, Planned]) -> None:
    name, found = family
    lowering = found.lowered("fused").lowering
    full, partial = (program.step.graph for program in lowering.programs)
    parts = [products(graph) for graph in (full, partial)]
    assert parts == [JOINED[name], []]
    assert lowering.report().joining.layers == sum(JOINED[name])
    assert found.lowered("plain").lowering.report().joining.layers == 0


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_launches(family: tuple[str, Planned], lowering: str) -> None:
    """At their tiny sizes, all products of one input gain by being joined."""
    name, found = family
    most = FAMILIES[name][lowering == "fused"]
    assert all(a <= b for a, b in zip(found.launches(lowering), most, strict=True)), found.launches(lowering)


def test_weights_launch_nothing_more(family: tuple[str, Planned]) -> None:
    """With two weights per entry, fused step programs make the launches of plain reuse, and may still be graphs."""
    _, found = family
    weights = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.5, -0.5]]
    plan = build_plan(found.plan.captured, found.plan.schedule.with_weights(weights))
    weighted = replace(found, plan=plan)
    assert len(plan.programs) == 2
    with mock.patch.object(lowered_plan, "weight_tables", return_value={}):  # no numbers can be put on this device
        weighted.lowered("fused")
    assert weighted.refusals("fused") == []
    assert weighted.launches("fused") == found.launches("fused")
