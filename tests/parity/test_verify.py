"""Verification passes what is right and fails what is wrong, naming step and site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.lower import plain
from harmonica_rt.options import LOWERINGS
from harmonica_rt.parity.tolerance import Allowance, Error, limit_from, same_bits
from tests.models import Stack, stack, stack_call

STEPS = 4


MANY = 64  # tokens: the largest error of a handful of values says little


def calls(dtype: torch.dtype = torch.float32, tokens: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{name: t.to(dtype) for name, t in stack_call(step, tokens=tokens).items()} for step in range(STEPS)]


def spoil(monkeypatch: pytest.MonkeyPatch, weight: str, factor: float) -> None:
    """Let every lowered program scale the result of the linear layer with this weight."""
    original = plain.with_stores

    def spoiled(step: Any, **options: Any) -> fx.Graph:
        graph = original(step, **options)
        name = f"p_{weight.replace('.', '_')}"
        for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)):
            if node.args[1].name == name:
                with graph.inserting_after(node):
                    scaled = graph.call_function(torch.mul, (node, factor))
                node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
        return graph

    monkeypatch.setattr(plain, "with_stores", spoiled)


def test_plain_is_exact() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    report = hrt.verify(model, schedule, lowering="plain", calls=calls())
    assert report.ok
    assert report.tolerance == "exact"
    assert [step.same_bits for step in report.steps] == [True] * STEPS
    assert report.trajectory_same_bits
    assert "4 equal bit for bit" in str(report)


@pytest.mark.parametrize("site", ["blocks.0.attn", "blocks.2.attn"])
def test_the_first_divergent_step_and_site_are_named(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    model = stack()
    sites = find_sites(model)
    mask = [[True] * 6, [False] * 6, [True] * 6, [True] * 6]
    spoil(monkeypatch, f"{site}.weight", 1.0 + 1e-6)
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(model, Schedule.from_array(mask, sites=sites), lowering="plain", calls=calls())
    assert (error.value.step, error.value.site) == (0, site)
    assert f"first divergent site {site}" in str(error.value)
    assert not error.value.report.ok


class PromptReader(Stack):
    """A `Stack` that counts the words of its prompt."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        return super().forward(latents * int(prompt_mask.sum()), timestep)


def test_a_site_of_a_model_that_reads_its_request_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = PromptReader().eval(), torch.ones(1, 3, dtype=torch.long)
    spoil(monkeypatch, "blocks.1.attn.weight", 1.0 + 1e-6)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(model, schedule, lowering="plain", calls=[{**call, "prompt_mask": mask} for call in calls()])
    assert (error.value.step, error.value.site) == (0, "blocks.1.attn")


def test_a_corrupted_slot_is_named_in_the_step_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt.execute.plan_stream import PlanStream
    from harmonica_rt.indices import SlotId

    original = PlanStream.run

    def corrupting(self: PlanStream[Any], step: Any, call: Any, *, catch_up: bool) -> Any:
        output = original(self, step, call, catch_up=catch_up)
        if step == 0:
            self.buffers.slots[SlotId(3)].add_(1.0)
        return output

    monkeypatch.setattr(PlanStream, "run", corrupting)
    model = stack()
    sites = find_sites(model)
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(model, Schedule.every(2, steps=STEPS, sites=sites), lowering="plain", calls=calls())
    assert (error.value.step, error.value.site) == (1, sites[3])


@pytest.mark.parametrize(
    ("lowering", "dtype"),
    [
        # Inductor compiles for seconds: once here, in half precision in tests/lower/test_inductor.py
        pytest.param(
            lowering,
            dtype,
            marks=pytest.mark.exhaustive if lowering == "inductor" and dtype is not torch.float32 else (),
            id=f"{lowering}-{dtype}",
        )
        for lowering in LOWERINGS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_measured_tolerance_passes_what_is_right(dtype: torch.dtype, lowering: str) -> None:
    model = stack().to(dtype)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    report = hrt.verify(model, schedule, lowering=lowering, calls=calls(dtype, MANY), tolerance="measured")
    assert report.tolerance == "measured"
    assert all(step.error.within(step.limit) and step.limit.rms > 0 for step in report.steps)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 1e-4), (torch.bfloat16, 1.1)], ids=str)
def test_measured_tolerance_fails_what_is_sloppy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    model = stack().to(dtype)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    spoil(monkeypatch, "blocks.1.attn.weight", factor)
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(model, schedule, lowering="plain", calls=calls(dtype), tolerance="measured")
    assert error.value.site == "blocks.1.attn"


def test_verify_at_compile_raises_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    spoil(monkeypatch, "blocks.1.attn.weight", 2.0)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="plain", verify=True)
    with pytest.raises(hrt.ParityError, match=r"blocks\.1\.attn"):
        compiled(**stack_call(0))


def test_calls_are_counted() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    with pytest.raises(HarmonicaError, match="holds 3 calls, the schedule has 4 steps"):
        hrt.verify(model, schedule, lowering="plain", calls=calls()[:3])
    with pytest.raises(HarmonicaError, match="needs calls:"):
        hrt.verify(model, schedule)


class TestTolerance:
    def test_nan_on_one_side_is_infinite(self) -> None:
        a = torch.tensor([1.0, float("nan")])
        assert Error.between(a, torch.ones(2)).largest == float("inf")
        assert Error.between(a, a).largest == 0.0

    def test_bits_are_stricter_than_values(self) -> None:
        assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
        assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))

    def test_the_limit_is_twice_the_eager_error_or_one_ulp(self) -> None:
        truth = torch.full((4,), 2.0, dtype=torch.float64)
        exact = limit_from(truth.float(), truth)
        assert exact.largest == pytest.approx(2.0 * 2**-23)
        off = limit_from(truth.float() + 0.25, truth)
        assert off.largest == pytest.approx(0.5)

    def test_how_far_the_largest_stands_out_is_learned_from_all_calls(self) -> None:
        truth, even = torch.zeros(100, dtype=torch.float64), torch.full((100,), 1e-3)
        peaked = even.clone()
        peaked[7] = 8e-3
        allowance = Allowance()
        assert allowance.limit(even, truth).largest == pytest.approx(2e-3)  # nothing stands out yet
        first = allowance.limit(peaked, truth)
        assert first.largest == pytest.approx(2 * 8e-3)
        peak = 8e-3 / Error.between(peaked, truth).rms
        later = allowance.limit(even, truth)
        assert later.largest == pytest.approx(2 * peak * 1e-3)
        assert later.rms == pytest.approx(2e-3)  # which no other call changes

    def test_one_wrong_value_is_still_seen(self) -> None:
        generator = torch.Generator().manual_seed(0)
        allowance = Allowance()
        for _ in range(20):
            truth = torch.randn(1000, generator=generator, dtype=torch.float64)
            limit = allowance.limit(truth.float() + 1e-6 * torch.randn(1000, generator=generator), truth)
        wrong = truth.float()
        wrong[3] += 1e-5
        error = Error.between(wrong, truth)
        assert error.rms < limit.rms
        assert not error.within(limit)

    def test_an_error_without_end_is_allowed_only_where_eager_has_one(self) -> None:
        allowance, truth = Allowance(), torch.ones(4, dtype=torch.float64)
        nan = torch.tensor([1.0, 1.0, 1.0, float("nan")])
        assert allowance.limit(nan, truth).largest == float("inf")
        assert not Error.between(nan, truth).within(allowance.limit(torch.ones(4), truth))
