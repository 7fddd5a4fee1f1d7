"""One iteration of step-wise denoising: its gradients, its trajectory, its streams."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_training.cached_forward import CachedForward, frozen
from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop
from harmonica_training.errors import TrainingError
from harmonica_training.sdt import StepLosses, step_losses
from tests import tiny

STEPS = 4


class Case:
    """A tiny pipeline under random scores."""

    def __init__(self, family: str = "dit", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        described = tiny.families()[family]
        torch.manual_seed(0)
        self.pipeline = described.build()
        self.model = nn.Module.to(self.pipeline.transformer, dtype)
        arguments = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in described.guided.items()
        }
        self.inputs = {**arguments, "class_labels": [1]} if family == "dit" else arguments
        self.sites = hrt.find_sites(self.model)
        self.loop = DenoisingLoop(self.pipeline, steps=STEPS)
        self.cached = CachedForward(self.model, self.sites, **options)
        self.scores = torch.rand(STEPS, len(self.sites), generator=torch.Generator().manual_seed(0)).to(dtype)
        self.scores[0] = 1.0

    def losses(self, scores: Tensor | None = None, **options: Any) -> StepLosses:
        scores = self.scores if scores is None else scores
        with frozen(self.model):
            return step_losses(
                self.loop,
                self.cached,
                self.inputs,
                [torch.Generator().manual_seed(5)],
                scores=scores,
                computes=(self.scores > 0.3).numpy(),
                **{"holds": "computed", "precision": contextlib.nullcontext, **options},
            )


# flux: two streams per step, and rotary embeddings in float32 whatever the model is in
@pytest.mark.parametrize(("family", "rtol"), [("dit", 1e-5), ("flux", 5e-3)], ids=["dit", "flux"])
@pytest.mark.parametrize("holds", ["computed", "blended"])
def test_gradient_of_each_step_is_its_finite_difference(family: str, rtol: float, holds: Any) -> None:
    case = Case(family, torch.float64)
    by_score = case.losses(holds=holds).by_score
    eps = 1e-6
    for step, site in [(1, 0), (2, 3), (3, 1)]:
        errors = []
        for sign in (1, -1):
            moved = case.scores.clone()
            moved[step, site] += sign * eps
            errors.append(case.losses(moved, holds=holds).mse[step])
        slope = (errors[0] - errors[1]) / (2 * eps)
        torch.testing.assert_close(by_score[step, site], slope, rtol=rtol, atol=1e-12)
    assert not by_score[0].any()


def test_nothing_is_lost_where_everything_computes() -> None:
    losses = Case().losses(torch.ones(STEPS, 4))
    assert not losses.mse.any()
    assert (losses.power[1:] > 0).all()
    assert losses.drawn.tolist() == [False, True, True, True]


def test_the_student_goes_its_own_way() -> None:
    """The targets of later steps are taken at the latents that caching led to."""
    case = Case()
    reused = case.scores.clone()
    reused[1] = 0.0
    assert not torch.equal(case.losses(reused).power[2], case.losses(torch.ones_like(reused)).power[2])
    assert torch.equal(case.losses(reused).power[:2], case.losses(torch.ones_like(reused)).power[:2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_and_loss_scale_change_no_number(checkpointing: bool) -> None:
    plain, other = Case().losses(), Case(checkpointing=checkpointing).losses(scale=1024.0)
    assert torch.equal(plain.mse, other.mse)
    assert torch.equal(plain.by_score, other.by_score)


def test_bf16_is_near_fp32() -> None:
    plain = Case().losses()
    low = Case().losses(precision=lambda: torch.autocast("cpu", torch.bfloat16))
    assert not torch.equal(plain.mse, low.mse)
    torch.testing.assert_close(low.mse, plain.mse, rtol=0.15, atol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(plain.by_score.flatten(), low.by_score.flatten(), dim=0)
    assert cosine > 0.99


def test_no_activation_outlives_its_step() -> None:
    """No tensor that a step's backward needs outlives the step."""
    case = Case()
    alive: list[int] = []
    packed: list[Any] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            packed.append(None)

        def __del__(self) -> None:
            packed.pop()

    blend = case.cached.blend

    def counted(*args: Any) -> Any:
        alive.append(len(packed))
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return blend(*args)

    case.cached.blend = counted  # type: ignore[method-assign]
    case.losses()
    assert alive == [0] * (STEPS - 1)


def test_a_stream_that_sets_in_late_computes_first() -> None:
    case = Case()
    calls: list[tuple[int, Any]] = []
    run = case.loop.run

    def relabelled(inputs: Any, generators: Any, denoise: Any, **options: Any) -> Tensor:
        def answer(call: DenoiserCall) -> Any:
            stream = (int(call.step >= 2), call.stream[1])
            calls.append((call.step, stream))
            return denoise(DenoiserCall(call.step, stream, call.forward))

        return run(inputs, generators, answer, **options)

    case.loop.run = relabelled  # type: ignore[method-assign]
    losses = case.losses()
    assert (losses.mse > 0).tolist() == [False, True, False, True]


def test_a_wrong_number_of_steps_is_refused() -> None:
    case = Case()
    with pytest.raises(TrainingError, match="expected a run of 3 steps"):
        case.losses(torch.ones(3, 4))
    assert case.losses().mse.isfinite().all()  # and the next run is right
