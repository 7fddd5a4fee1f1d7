"""A DiT as its authors wrote it, on timm's layers: no diffusers, sites by globs or by the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites

STEPS, WIDTH, HEADS, DEPTH = 6, 16, 2, 3
PATTERNS = ["blocks.*.attn", "blocks.*.mlp"]


class Attention(nn.Module):
    """timm's: one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH))


class Mlp(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """adaLN-Zero, its six vectors from one layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """Latents [B, 4, 8, 8], timesteps [B], classes [B] -> [B, 4, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.linear = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        angles = t[:, None].float() * torch.exp(-torch.arange(4, device=t.device))
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        patches = self.linear(modulate(self.norm_final(tokens), shift, scale))
        return patches.reshape(-1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def model_and_calls() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    model = DiT().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    calls = [
        {
            "x": torch.randn(2, 4, 8, 8, generator=generator),
            "t": torch.full((2,), 900 - 150 * step),
            "y": torch.tensor([3, 7]),
        }
        for step in range(STEPS)
    ]
    return model, calls


def test_the_rule_finds_what_the_globs_do() -> None:
    model, _ = model_and_calls()
    assert find_sites(model) == find_sites(model, PATTERNS)
    assert len(find_sites(model)) == 2 * DEPTH


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_compiled_equals_reference(lowering: str) -> None:
    model, calls = model_and_calls()
    schedule = Schedule.random(0.5, steps=STEPS, sites=find_sites(model, PATTERNS), seed=1)
    report = hrt.verify(model, schedule, calls=calls, lowering=lowering)
    assert report.ok
    assert lowering == "fused" or all(step.same_bits for step in report.steps)


def test_every_norm_is_fused_with_its_residuals_and_adaln_is_hoisted() -> None:
    model, calls = model_and_calls()
    compiled: Any = hrt.compile(model, Schedule.every(2, steps=STEPS, sites=find_sites(model, PATTERNS)), strict=True)
    for call in calls:
        compiled(**call)
    plan = compiled.report().plans[0]
    full, idle = plan.fusion.programs
    # the first norm follows no residual; the last one does, and takes all six of a step that reuses everything
    assert full["residual_reuse_norm_modulate"] == 2 * DEPTH
    assert full["norms left"] == 1
    assert idle["residual_reuse_norm_modulate"] == 1
    assert idle["norms left"] == 0
    assert plan.hoisting.values > 0
    assert compiled.report().last_cur == pytest.approx(0.5)
