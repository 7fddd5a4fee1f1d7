"""Quantised weights: captured, or run without a plan and the reason said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from tests.pipelines_in_use.small import FLUX, change
from tests.quantised import Int8Weight, WithBuffers, WithState, quantise, quantised, with_tensor_subclass
from tests.tiny import random_schedule, sample
from tests.truth import pair

STEPS = 5
CALL = FLUX.unguided


def build(layer: Any) -> Any:
    pipeline = FLUX.build()
    quantise(pipeline.transformer, layer, "transformer_blocks")
    return pipeline


@pytest.mark.parametrize(
    ("layer", "lowering"),
    [(with_tensor_subclass, "plain"), (with_tensor_subclass, "fused"), (WithBuffers, "fused")],
    ids=["tensor subclass, plain", "tensor subclass, fused", "buffers, fused"],
)
def test_quantised_layers_are_captured(layer: Any, lowering: str) -> None:
    made = pair(lambda: build(layer), lambda model: random_schedule(model, STEPS, seed=9), lowering)
    report = made.check(CALL)
    assert len(report.plans) == 1


def replacement(weight: Any) -> Int8Weight:
    return Int8Weight(weight.values_int8 + 5, weight.scale)


def test_a_replaced_parameter_is_seen() -> None:
    made = pair(lambda: build(with_tensor_subclass), lambda model: random_schedule(model, STEPS, seed=9), "fused")
    layers = [pipeline.transformer.single_transformer_blocks[0].proj_out for pipeline in (made.plain, made.compiled)]
    changes: list[Callable[[Any], object]] = [
        lambda layer: layer.weight.values_int8.neg_(),
        # the same Parameter, made of another tensor
        lambda layer: setattr(layer.weight, "values_int8", torch.full_like(layer.weight.values_int8, 3)),
        lambda layer: setattr(layer, "weight", nn.Parameter(replacement(layer.weight), requires_grad=False)),
    ]
    images = [made.run(CALL)[2]]
    for replace in changes:
        for layer in layers:
            replace(layer)
        _, expected, got, _ = made.run(CALL)
        assert made.same(got, expected)
        images.append(got)
    assert not any(made.same(a, b) for a, b in itertools.pairwise(images))


def test_quantising_after_compiling_makes_a_new_plan(caplog: pytest.LogCaptureFixture) -> None:
    made = pair(FLUX.build, lambda model: random_schedule(model, STEPS, seed=9), "fused")
    before = made.run(CALL)[2]
    change(made, lambda pipeline: quantise(pipeline.transformer, with_tensor_subclass, "transformer_blocks"))
    made.check(CALL)
    assert not made.same(made.run(CALL)[2], before)
    assert any("captured again" in line for line in caplog.messages)


def test_what_no_graph_can_hold_runs_without_a_plan() -> None:
    torch.manual_seed(0)
    pipeline = build(WithState)
    pipeline.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipeline.transformer, STEPS, seed=9)
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="fused")
    with pytest.warns(hrt.FallbackWarning, match="cannot be traced into one graph"):
        got = sample(pipeline, STEPS, **CALL)
    assert (got == expected).all()
    report = hrt.get_compiled(pipeline).report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert "NOT COMPILED" in str(report)


def test_quantised_values_are_near_the_originals() -> None:
    weight = torch.randn(6, 4)
    values, scale = quantised(weight)
    assert (values * scale - weight).abs().max() < weight.abs().max() / 100
