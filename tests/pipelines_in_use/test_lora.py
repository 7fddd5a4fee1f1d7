"""LoRA after compiling: loaded, scaled, fused, switched off, swapped, removed. Never stale, and each change is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tiny import families, random_schedule
from tests.truth import Pair, pair

peft = pytest.importorskip("peft", reason="diffusers loads LoRAs with it")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),  # a second adapter
]

STEPS = 4
FLUX = families()["flux"]
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


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    return {"a": lora(1), "b": lora(2)}


def compiled(lowering: str) -> Pair:
    return pair(FLUX.build, lambda model: random_schedule(model, STEPS, seed=9), lowering)


def change(made: Pair, what: Callable[[Any], Any]) -> None:
    for pipeline in (made.plain, made.compiled):
        what(pipeline)


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_everything_in_turn(
    lowering: str, weights: dict[str, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    made = compiled(lowering)
    before = made.run(CALL)[2]
    # what is done, and whether it is more than other values in the same weights
    turns: list[tuple[Callable[[Any], Any], bool]] = [
        (lambda p: p.load_lora_weights(dict(weights["a"]), adapter_name="a"), True),
        (lambda p: p.set_adapters("a", 0.5), True),
        (lambda p: p.load_lora_weights(dict(weights["b"]), adapter_name="b"), True),
        (lambda p: p.set_adapters(["a", "b"], [0.3, 0.7]), True),
        (lambda p: p.fuse_lora(), True),
        (lambda p: p.unfuse_lora(), True),
        (lambda p: p.disable_lora(), True),
        (lambda p: p.enable_lora(), True),
        (lambda p: p.delete_adapters("b"), True),
        (lambda p: p.set_adapters("a", 1.0), True),
        (lambda p: p.load_lora_weights(dict(weights["b"]), adapter_name="a", hotswap=True), False),
        (lambda p: p.load_lora_weights(dict(weights["a"]), adapter_name="a", hotswap=True), False),
        (lambda p: p.unload_lora_weights(), True),
    ]
    for what, structural in turns:
        caplog.clear()
        change(made, what)
        truth, expected, got, report = made.run(CALL)
        assert made.same(got, expected)
        assert not made.same(got, before)
        assert report.last_cur == pytest.approx(made.schedule.cur)
        assert len(report.plans) == 1
        assert any("captured again" in line for line in caplog.messages) is structural
        before = got


def test_a_scale_in_the_call(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    made = compiled("plain")
    change(made, lambda p: p.load_lora_weights(dict(weights["a"]), adapter_name="a"))
    images = []
    for scale in (0.3, 1.0, 0.3, 0.7):
        call = {**CALL, "joint_attention_kwargs": {"scale": scale}}
        made.check(call)
        images.append(made.run(call)[2])
    assert made.same(images[0], images[2])
    assert not made.same(images[0], images[1])
    assert not made.same(images[0], images[3])


def test_fused_into_the_weights_and_unloaded(
    weights: dict[str, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """As for deployment: what is left is the plain model with other weights."""
    made = compiled("fused")
    before = made.run(CALL)[2]

    def fuse(pipeline: Any) -> None:
        pipeline.load_lora_weights(dict(weights["a"]), adapter_name="a")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()

    change(made, fuse)
    made.check(CALL)
    assert not made.same(made.run(CALL)[2], before)


def test_a_hot_swap_between_ranks(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Weights are padded to the largest rank, so that they can be swapped in place."""
    made = compiled("plain")
    change(made, lambda p: p.enable_lora_hotswap(target_rank=4))
    change(made, lambda p: p.load_lora_weights(dict(weights["a"]), adapter_name="a"))
    first = made.run(CALL)[2]
    wide = lora(3, rank=4)
    change(made, lambda p: p.load_lora_weights(dict(wide), adapter_name="a", hotswap=True))
    made.check(CALL)
    assert not made.same(made.run(CALL)[2], first)
