"""LoRA after compiling: loaded, scaled, fused, switched off, swapped, removed. Never stale, each change logged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.pipelines_in_use.small import FLUX, change
from tests.tiny import random_schedule
from tests.truth import Pair, pair

peft = pytest.importorskip("peft", reason="diffusers loads LoRAs with it")

# said of a second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

STEPS = 4
CALL = FLUX.unguided
TARGETS = ["to_q", "to_v", "to_out.0", "proj_mlp"]


def lora(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """Random weights, named as in a file."""
    from peft.utils import get_peft_model_state_dict

    model = FLUX.build().transformer
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{name}": 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in get_peft_model_state_dict(model).items()
    }


def compiled(lowering: str) -> Pair:
    return pair(FLUX.build, lambda model: random_schedule(model, STEPS, seed=9), lowering)


def load(which: str, **options: Any) -> Callable[[Any], None]:
    return lambda pipeline: pipeline.load_lora_weights(dict(weights(which)), adapter_name=which, **options)


@functools.cache
def weights(which: str) -> dict[str, torch.Tensor]:
    return lora({"a": 1, "b": 2}[which])


def use_both(pipeline: Any) -> None:
    load("b")(pipeline)
    pipeline.set_adapters(["a", "b"], [0.3, 0.7])


def switch_on_and_swap(pipeline: Any) -> None:
    pipeline.enable_lora()
    pipeline.delete_adapters("b")
    pipeline.load_lora_weights(dict(weights("b")), adapter_name="a", hotswap=True)


# what is done, and whether images differ for it by more than rounding
TURNS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "load one": (load("a"), True),
    "scale it": (lambda p: p.set_adapters("a", 0.5), True),
    "load another and use both": (use_both, True),
    "fuse": (lambda p: p.fuse_lora(), False),
    "unfuse": (lambda p: p.unfuse_lora(), False),
    "switch off": (lambda p: p.disable_lora(), True),
    "switch on, delete and swap": (switch_on_and_swap, True),
    "unload": (lambda p: p.unload_lora_weights(), True),
}


# the model may then be what it was in an earlier turn, and the plan that was made for it is found again
COMES_BACK = ("unfuse", "unload")


def test_every_change_to_a_lora_is_seen_at_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    made = compiled("plain")
    before = made.run(CALL)[2]
    for turn, (what, differs) in TURNS.items():
        caplog.clear()
        change(made, what)
        _, expected, got, report = made.run(CALL)
        assert made.same(got, expected), turn
        assert not (differs and made.same(got, before)), turn
        assert report.last_cur == pytest.approx(made.schedule.cur)
        told = any("captured again" in line for line in caplog.messages)
        assert told or turn in COMES_BACK, turn
        before = got


def test_a_scale_in_the_call_makes_its_own_plan() -> None:
    made = compiled("plain")
    change(made, load("a"))
    images = []
    for scale in (0.3, 1.0):
        call = {**CALL, "joint_attention_kwargs": {"scale": scale}}
        _, expected, got, report = made.run(call)
        assert made.same(got, expected)
        images.append(got)
    assert not made.same(*images)
    assert len(report.plans) == 2


def test_a_lora_fused_into_the_parameters_is_seen() -> None:
    """As for deployment: what is left is the plain model with other weights."""
    made = compiled("fused")
    before = made.run(CALL)[2]

    def fuse(pipeline: Any) -> None:
        load("a")(pipeline)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()

    change(made, fuse)
    _, expected, got, _ = made.run(CALL)
    assert made.same(got, expected)
    assert not made.same(got, before)


def test_a_hot_swap_keeps_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    """Weights are padded to the largest rank before compiling; swapping writes into them."""

    def build() -> Any:
        pipeline = FLUX.build()
        pipeline.enable_lora_hotswap(target_rank=4)
        load("a")(pipeline)
        return pipeline

    made = pair(build, lambda model: random_schedule(model, STEPS, seed=9), "fused")
    first = made.run(CALL)[2]
    wide = lora(3, rank=4)
    change(made, lambda p: p.load_lora_weights(dict(wide), adapter_name="a", hotswap=True))
    _, expected, got, _ = made.run(CALL)
    assert made.same(got, expected)
    assert not made.same(got, first)
    assert not any("captured again" in line for line in caplog.messages)
