"""Blending, reusing and computing sites: against the runtime's reference, the definition, and finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_rt.errors import SiteError
from harmonica_training.cached_forward import Cache, CachedForward, first_tensor, frozen
from harmonica_training.errors import TrainingError
from tests import tiny


def dit_and_calls(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A tiny DiT and the arguments of three calls."""
    model = tiny.dit().transformer.to(dtype)
    generator = torch.Generator().manual_seed(0)
    return model, [
        {
            "hidden_states": torch.randn(2, 4, 4, 4, generator=generator).to(dtype),
            "timestep": torch.tensor([t, t]),
            "class_labels": torch.tensor([1, 2]),
        }
        for t in (900, 500, 100)
    ]


@torch.no_grad()
def test_reuse_is_the_reference() -> None:
    model, calls = dit_and_calls()
    schedule = tiny.random_schedule(model, 3)
    reference = hrt.reference(model, schedule)
    cached = CachedForward(model, schedule.sites)
    cache: Cache = {}
    for row, call in zip(schedule.compute.tolist(), calls, strict=True):
        output, cache = cached.reuse(lambda call=call: model(**call), row, cache)  # type: ignore[misc]
        assert torch.equal(output.sample, reference(**call).sample)


@torch.no_grad()
def test_blend_ends_at_compute_and_reuse() -> None:
    model, (before, now, _) = dit_and_calls()
    sites = hrt.find_sites(model)
    cached = CachedForward(model, sites)
    _, cache = cached.compute(lambda: model(**before))
    plain = model(**now).sample
    computed, after = cached.blend(lambda: model(**now), torch.ones(4), [True] * 4, cache, "computed")
    assert torch.equal(computed.sample, plain)
    assert all(torch.equal(after[place], value) for place, value in cached.compute(lambda: model(**now))[1].items())
    reused, after = cached.blend(lambda: model(**now), torch.zeros(4), [False] * 4, cache, "computed")
    assert torch.equal(reused.sample, cached.reuse(lambda: model(**now), [False] * 4, cache)[0].sample)
    assert after == cache
    assert not torch.equal(reused.sample, plain)


@pytest.mark.parametrize("holds", ["computed", "blended"])
@torch.no_grad()
def test_the_cache_holds_what_was_computed_or_blended(holds: Any) -> None:
    model, (before, now, _) = dit_and_calls()
    sites = hrt.find_sites(model)
    cached = CachedForward(model, sites)
    _, cache = cached.compute(lambda: model(**before))
    scores = torch.tensor([0.25, 1.0, 1.0, 1.0])
    _, after = cached.blend(lambda: model(**now), scores, [True] * 4, cache, holds)
    computed = cached.compute(lambda: model(**now))[1][0, 0]  # of the first site, which no other site comes before
    old = cache[0, 0]
    expected = computed if holds == "computed" else torch.lerp(old, computed, scores[0])
    assert torch.equal(after[0, 0], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_the_finite_difference(checkpointing: bool) -> None:
    model, (before, now, _) = dit_and_calls(torch.float64)
    cached = CachedForward(model, hrt.find_sites(model), checkpointing=checkpointing)

    def error(scores: Tensor) -> Tensor:
        output, _ = cached.blend(lambda: model(**now), scores, [True] * 4, cache, "computed")
        return first_tensor(output).square().mean()

    with frozen(model):
        with torch.no_grad():
            _, cache = cached.compute(lambda: model(**before))
        scores = torch.tensor([0.3, 0.9, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
        error(scores).backward()
    eps = 1e-6
    with torch.no_grad():
        slopes = [(error(scores + eps * e) - error(scores - eps * e)) / (2 * eps) for e in torch.eye(4).double()]
    torch.testing.assert_close(scores.grad, torch.stack(slopes), rtol=1e-6, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sites_may_have_several_outputs() -> None:
    pipeline = tiny.sd3()
    model = pipeline.transformer
    sites = hrt.find_sites(model)
    cached = CachedForward(model, sites)
    call = {
        "hidden_states": torch.randn(1, 16, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        output, cache = cached.compute(lambda: model(**call))
        assert any(isinstance(value, tuple) for value in cache.values())
        again, _ = cached.reuse(lambda: model(**call), [False] * len(sites), cache)
    assert torch.equal(again.sample, output.sample)


def test_frozen_gives_everything_back() -> None:
    model, _ = dit_and_calls()
    model.train()
    model.pos_embed.eval()
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not model.pos_embed.training


class Tied(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = nn.Linear(4, 4)
        block.ff = nn.Sequential(nn.Linear(4, 4))
        block.forward = lambda x: x + block.ff(x + block.attn(x))  # type: ignore[method-assign]
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x))  # type: ignore[no-any-return]


def test_blocks_may_be_tied() -> None:
    model = Tied()
    sites = ["blocks.0.attn", "blocks.0.ff"]
    x = torch.randn(2, 4)
    with torch.no_grad():
        output, cache = CachedForward(model, sites).compute(lambda: model(x))
        assert len(cache) == 4
        again, _ = CachedForward(model, sites).reuse(lambda: model(2 * x), [False, False], cache)
    assert np.allclose(again, output + x, atol=1e-6)  # residuals of the cache on the new input
    checkpointed = CachedForward(model, sites, checkpointing=True)
    with pytest.raises(TrainingError, match="several times"):
        checkpointed.blend(lambda: model(x), torch.ones(2), [True, True], cache, "computed")


def test_an_unknown_site_is_refused() -> None:
    with pytest.raises(SiteError, match=r"has no module blocks\.9"):
        CachedForward(Tied(), ["blocks.9"])
