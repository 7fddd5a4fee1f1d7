"""Each family on a fake `cuda:0`: captured, planned, lowered and run. `test_fake_cuda.py` runs these in a process."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.execute.slot_buffers import SlotBuffers
from harmonica_rt.graph.facts import device_of
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
    "dit": ((103, 67), (27, 5)),
    "pixart-alpha": ((92, 36), (35, 5)),
    "sd3": ((256, 48), (74, 7)),
    "flux": ((264, 74), (75, 11)),
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


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_launches(family: tuple[str, Planned], lowering: str) -> None:
    name, found = family
    most = FAMILIES[name][lowering == "fused"]
    assert all(a <= b for a, b in zip(found.launches(lowering), most, strict=True)), found.launches(lowering)
