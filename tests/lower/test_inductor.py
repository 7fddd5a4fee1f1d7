"""The `inductor` lowering: one compilation for each unique region, live weights, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.errors import RegionError
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower import inductor
from harmonica_rt.lower.compiled_region import CompiledRegion
from harmonica_rt.lower.faster_of_two import ROUNDS, Faster
from harmonica_rt.lower.inductor import InductorLowering
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.regions import Region, operators
from harmonica_rt.lower.report import RegionReport
from harmonica_rt.plan.plan import build_plan
from tests import tiny
from tests.lower.test_regions import dit, dit_call, random_schedule
from tests.models import Stack, stack, stack_call

STEPS = 4


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What is given to Inductor, which is not run: a graph stands for what it would be compiled to."""
    given: list[fx.GraphModule] = []

    def compile(module: fx.GraphModule, examples: list[Tensor], options: dict[str, Any]) -> Any:
        assert len(examples) == len(module.graph.find_nodes(op="placeholder"))
        given.append(module)
        return module.forward

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return given


def lowered(model: nn.Module, call: dict[str, Any], schedule: Schedule) -> InductorLowering:
    normal = CallConvention(model).normalise((), call)
    return InductorLowering(build_plan(capture(model, normal, schedule.sites), schedule), roles(normal))


def regions_of(lowering: InductorLowering) -> RegionReport:
    found = lowering.report().regions
    assert found is not None
    return found


def whole_programs(compiled: hrt.api.CompiledModel) -> tuple[int, int]:
    """Number of step programs that were also compiled whole, and of those that measured faster that way."""
    regions = compiled.report().plans[0].regions
    assert regions is not None
    return regions.whole, regions.whole_faster


def test_compilations_grow_neither_with_blocks_nor_with_patterns(compilations: list[fx.GraphModule]) -> None:
    counts, calls = set(), []
    for layers, patterns in ((3, 8), (5, 8), (5, 3)):
        compilations.clear()
        model = dit(layers)
        lowering = lowered(model, dit_call(), random_schedule(find_sites(model), patterns))
        counts.add(len(compilations))
        assert regions_of(lowering).unique == len(compilations) <= 8
        calls.append(sum(regions_of(lowering).calls))
    assert counts == {5}  # patch embedding with and without the first attention, attention, feed-forward, the tail
    assert calls[1] > calls[0] > 5


def test_few_patterns_that_cost_little_are_compiled_whole_too(compilations: list[fx.GraphModule]) -> None:
    model = dit(4)
    sites = find_sites(model)
    lowering = lowered(model, dit_call(), Schedule.every(2, steps=STEPS, sites=sites))
    assert regions_of(lowering).whole == len(lowering.programs) == 2
    assert len(compilations) == regions_of(lowering).unique + 2
    stored = [len(program.step.stored_nodes) for program in lowering.programs]
    copies = [len(graph.graph.find_nodes(op="call_method", target="copy_")) for graph in compilations[-2:]]
    assert copies == stored == [len(sites), 0]
    compilations.clear()
    half = np.arange(len(sites)) % 2 == 0
    mixed = Schedule.from_array(np.stack([half | True, half, ~half, half]), sites=sites)
    assert not regions_of(lowered(model, dit_call(), mixed)).whole  # together they are more than one and a quarter


def test_large_programs_are_not_compiled_whole(
    compilations: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dit(4)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    sizes = [operators(program.step) for program in lowered(model, dit_call(), schedule).programs]
    monkeypatch.setattr(inductor, "MOST_OPERATORS", sum(sizes))
    assert regions_of(lowered(model, dit_call(), schedule)).whole
    monkeypatch.setattr(inductor, "MOST_OPERATORS", sum(sizes) - 1)
    assert not regions_of(lowered(model, dit_call(), schedule)).whole


def test_the_first_call_measures_and_the_faster_program_stays() -> None:
    calls: list[str] = []

    class Named(Program):
        def __init__(self, name: str) -> None:
            self.name, self.step = name, step

        def __call__(self, *arguments: Any) -> tuple[Any, ...]:
            calls.append(self.name)
            return (self.name, *arguments)

    step: Any = object()
    times = iter([0.0, 3.0, 0.0, 2.0] * (ROUNDS - 1) + [0.0, 1.0, 0.0, 5.0])
    faster = Faster(Named("regions"), Named("whole"), clock=lambda: next(times))
    got = [faster((), [], [], [])[0] for _ in range(3)]
    assert got == ["regions"] * 3  # 1 s at best, the other takes 2 s
    assert faster.seconds == (1.0, 2.0)
    assert calls == ["regions", "whole"] * (1 + ROUNDS) + ["regions"] * 3
    slower = Faster(Named("regions"), Named("whole"), clock=iter([0.0, 3.0, 0.0, 2.0] * ROUNDS).__next__)
    assert slower((), [], [], [])[0] == "whole"


def test_what_cannot_be_compiled_whole_stays_in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Any, region: Region) -> Any:
        raise RegionError("too much at once")

    monkeypatch.setattr(inductor, "WholeProgram", refuse)
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="inductor", strict=True)
    torch.testing.assert_close(run(compiled), run(hrt.reference(model, schedule)))
    assert whole_programs(compiled) == (0, 0)


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)], ids=["regions", "whole"])
def test_both_give_what_the_model_gives(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float]) -> None:
    monkeypatch.setattr(Faster, "_measured", lambda self, arguments: seconds)
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="inductor", strict=True, debug=True)
    torch.testing.assert_close(run(compiled), run(hrt.reference(model, schedule)))
    assert whole_programs(compiled) == (2, 2 if seconds[1] < seconds[0] else 0)


def test_catching_up_compiles_nothing_new(compilations: list[fx.GraphModule]) -> None:
    model = dit(2)
    normal = CallConvention(model).normalise((), dit_call())
    plan = build_plan(capture(model, normal, find_sites(model)), random_schedule(find_sites(model), 4))
    lowering = InductorLowering(plan, roles(normal))
    before = len(compilations)
    for step in range(2, 5):
        graph, _ = plan.catch_up_graph(StepIndex(step))
        lowering.program(graph)
    assert len(compilations) == regions_of(lowering).unique == before


def run(compiled: Any, steps: int = STEPS) -> list[Tensor]:
    compiled.reset()
    return [compiled(**stack_call(step)) for step in range(steps)]


def test_compiled_regions_give_what_the_model_gives_and_see_its_weights() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="inductor", strict=True, debug=True)
    truth = hrt.reference(model, schedule)
    counters.clear()

    def agree() -> None:
        # all outputs of a run are looked at when it is over: none may lie in a slot, which debug mode has overwritten
        torch.testing.assert_close(run(compiled), run(truth))

    agree()
    plan = compiled.report().plans[0]
    regions = plan.regions
    assert regions is not None
    total = regions.unique + regions.whole
    assert total == counters["aot_autograd"]["total"] > regions.unique > 0
    assert f"{regions.unique} unique regions compiled in" in str(compiled.report())
    assert "2 of the programs also compiled whole" in str(compiled.report())
    assert sum(regions.calls) > regions.unique
    assert 0 < regions.seconds < plan.times.lower
    with torch.no_grad():
        model.blocks[1].mlp[0].weight.mul_(3)  # type: ignore[index,union-attr]
    agree()
    model.blocks[0].mlp[2].bias = nn.Parameter(torch.ones(8))  # type: ignore[index,union-attr]
    agree()
    with torch.inference_mode():
        agree()
    assert counters["aot_autograd"]["total"] == total  # none of this compiles again


def test_half_precision_is_within_the_measured_tolerance() -> None:
    """Inductor rounds less often than eager PyTorch does; tests/parity has other dtypes."""
    model = tiny.dit().transformer.to(torch.bfloat16)
    calls = [{**dit_call(), "hidden_states": torch.randn(2, 4, 4, 4).bfloat16()} for _ in range(STEPS)]
    assert hrt.verify(model, tiny.random_schedule(model, STEPS), calls=calls, lowering="inductor").ok


def region(inputs: list[Tensor]) -> Region:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    total = graph.call_function(torch.ops.aten.add.Tensor, (a, b))
    graph.output((graph.call_function(torch.ops.aten.exp.default, (total,)),))
    return Region(graph, tuple(inputs), "add, exp", "add to exp")


def test_inputs_that_lie_differently_are_laid_out_anew() -> None:
    a, b = torch.randn(3, 5), torch.randn(5).expand(3, 5)
    compiled = CompiledRegion(region([a, b]), "region")
    expected = (a + b).exp()
    for given in ((a, b), (a.t().contiguous().t(), b), (a, b.contiguous())):
        (got,) = compiled(*given)
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


def test_what_cannot_be_compiled_says_where_and_what_to_do() -> None:
    model: Stack = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="inductor", strict=True)
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(RegionError, match=r"blocks\.0\.mlp.*no-such-compiler.*lowering='fused'"),
    ):
        compiled(**stack_call(0))
