"""What a user set up of the numerics stays: half precision, channels_last, and the attention kernel that was chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_rt as hrt
from tests.tiny import dit, random_schedule

STEPS = 4
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def model_and_calls(dtype: torch.dtype) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = dit().transformer.to(dtype)
    calls = [
        {
            "hidden_states": torch.randn(2, 4, 4, 4, dtype=dtype),
            "timestep": torch.full((2,), 900 - 200 * step),
            "class_labels": torch.tensor([1, 2]),
        }
        for step in range(STEPS)
    ]
    return model, calls


def run(compiled: Any, calls: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    compiled.reset()
    return [compiled(**call).sample for call in calls]


@pytest.mark.parametrize("lowering", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_within_the_tolerance(dtype: torch.dtype, lowering: str) -> None:
    model, calls = model_and_calls(dtype)
    schedule = random_schedule(model, STEPS)
    report = hrt.verify(model, schedule, calls=calls, lowering=lowering)
    assert report.ok
    assert report.tolerance == ("exact" if lowering == "plain" else "measured")
    assert run(hrt.compile(model, schedule, lowering=lowering, strict=True), calls)[-1].dtype is dtype


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_channels_last_stays(lowering: str) -> None:
    model, calls = model_and_calls(torch.float32)
    model.to(memory_format=torch.channels_last)
    calls = [{**c, "hidden_states": c["hidden_states"].to(memory_format=torch.channels_last)} for c in calls]
    schedule = random_schedule(model, STEPS)
    assert model.pos_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert hrt.verify(model, schedule, calls=calls, lowering=lowering).ok
    (expected, got) = (run(made, calls) for made in (hrt.reference(model, schedule), hrt.compile(model, schedule)))
    assert [a.stride() for a in got] == [b.stride() for b in expected]


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_under_autocast_every_run_is_within_twice_the_error_of_eager(lowering: str) -> None:
    """The first run computes hoisted values step by step, the others all at once."""
    model, calls = model_and_calls(torch.float32)
    schedule = random_schedule(model, STEPS)
    reference, compiled = hrt.reference(model, schedule), hrt.compile(model, schedule, lowering=lowering, strict=True)
    truth = torch.stack(run(reference, calls))
    with torch.autocast("cpu", torch.bfloat16):
        eager = torch.stack(run(reference, calls))
        found = [torch.stack(run(compiled, calls)) for _ in range(3)]
    for each in found:
        assert each.dtype is eager.dtype
        assert (each - truth).norm() <= 2 * (eager - truth).norm()


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_the_attention_kernel_is_the_one_that_was_chosen(lowering: str) -> None:
    model, calls = model_and_calls(torch.float32)
    schedule = hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule, lowering=lowering, strict=True)
    run(compiled, calls)  # compiled while no kernel was chosen
    computed = 2 * STEPS // 2  # two blocks, every second step
    with Operators() as free:
        run(compiled, calls)
    assert free.counts[FLASH] == computed
    with sdpa_kernel(SDPBackend.MATH), Operators() as chosen:
        run(compiled, calls)
    assert chosen.counts[FLASH] == 0
    assert chosen.counts["aten::bmm"] + chosen.counts["aten::_safe_softmax"] >= computed
