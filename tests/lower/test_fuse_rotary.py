"""Queries and keys in every form that models write: fused by the calls that are expected, and equal in value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica_rt.call.roles import Role
from harmonica_rt.lower.fuse import FusedStep, fuse
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.schedule import Schedule
from tests.lower.test_fuse import Subject, assert_within, normal, slots_of
from tests.tiers import member

HEADS, WIDTH, TEXT, IMAGE = 3, 16, 5, 12
"""Heads, numbers per head, tokens of text and of the image."""


class Joint(nn.Module):
    """Attention over text and image, whose queries and keys `form(module, text, image, cos, sin)` prepares."""

    def __init__(self, form: Callable[..., tuple[Tensor, Tensor]], heads_first: bool) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        self.text, self.image = (nn.ModuleList([nn.Linear(inner, inner) for _ in "qkv"]) for _ in range(2))
        self.torch_norm, self.layer, self.own = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH), RMSNorm(WIDTH, eps=1e-6)
        self.of_text, self.across = RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(inner)
        self.out = nn.Linear(inner, inner)
        self.form, self.heads_first = form, heads_first
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor, prompt: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = [[layer(given) for layer in layers] for layers, given in ((self.text, prompt), (self.image, x))]
        (text_q, text_k, text_v), (q, k, v) = parts
        q, k = (self.form(self, self.split(a), self.split(b), cos, sin) for a, b in ((text_q, q), (text_k, k)))
        v = torch.cat([self.split(text_v), self.split(v)], dim=2 if self.heads_first else 1)
        if not self.heads_first:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(out[:, TEXT:])

    def split(self, t: Tensor) -> Tensor:
        t = t.unflatten(-1, (HEADS, WIDTH))
        return t.transpose(1, 2) if self.heads_first else t


def joined(m: Joint, text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image], dim=2 if m.heads_first else 1)


def turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def flux(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_emb(joined(m, m.of_text(text), m.own(image)), (cos, sin), sequence_dim=1)


def halves(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, m.torch_norm(text), m.torch_norm(image))
    return apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=-2, sequence_dim=1)


def chunks(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, m.torch_norm(text), m.torch_norm(image))
    cos, sin = cos[None, :, None], sin[None, :, None]
    return (x.float() * cos + turned(x).float() * sin).to(x.dtype)


def in_their_dtype(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, text, image)
    return x * cos[:, None].to(x.dtype) + sin[:, None].to(x.dtype) * sliced(x)


def complex_numbers(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.complex(cos[:, ::2].float(), sin[:, ::2].float())
    parts = ((m.of_text(text), table[:TEXT]), (m.own(image), table[TEXT:]))
    return joined(m, *(apply_rotary_emb_qwen(x, part, use_real=False) for x, part in parts))


def written(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Wan does."""
    x = joined(m, text, image)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def stacked(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Mochi does."""
    x = joined(m, m.of_text(text), m.own(image))
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos[:, None, 0::2].float(), sin[:, None, 1::2].float()
    return torch.stack([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], dim=-1).flatten(-2)


def across_heads(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = m.across(joined(m, text, image).flatten(2)).unflatten(2, (HEADS, -1))
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def image_only(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the single blocks of HunyuanVideo do."""
    x = m.own(joined(m, text, image))
    return torch.cat([x[:, :TEXT], apply_rotary_emb(x[:, TEXT:], (cos[TEXT:], sin[TEXT:]), sequence_dim=1)], dim=1)


def into_the_rest(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As CogVideoX does."""
    x = m.layer(joined(m, text, image))
    x[:, :, TEXT:] = apply_rotary_emb(x[:, :, TEXT:], (cos[TEXT:], sin[TEXT:]))
    return x


def norms_alone(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As SD3 does."""
    return joined(m, m.of_text(text), m.own(image))


TOKENS_FIRST = (flux, halves, chunks, in_their_dtype, complex_numbers, written, stacked, across_heads, image_only)
FORMS = {form.__name__: (form, False) for form in TOKENS_FIRST}
FORMS |= {form.__name__: (form, True) for form in (into_the_rest, norms_alone)}


def subject(form: Any, dtype: torch.dtype, heads_first: bool = False, values: torch.dtype | None = None) -> Subject:
    torch.manual_seed(0)
    angles = normal(TEXT + IMAGE, WIDTH // 2).repeat_interleave(2, dim=-1)
    if form in (halves, chunks, in_their_dtype):
        angles = torch.cat([angles[:, ::2], angles[:, ::2]], dim=-1)
    inputs = {"x": normal(2, IMAGE, HEADS * WIDTH), "prompt": normal(2, TEXT, HEADS * WIDTH)}
    inputs |= {"cos": angles.cos(), "sin": angles.sin()}
    inputs = {name: value.to(values or dtype) for name, value in inputs.items()}
    return Subject.of(Joint(form, heads_first).to(values or dtype), inputs, ["out"], dtype)


def check(form: Any, dtype: torch.dtype, heads_first: bool) -> FusedStep:
    """Fuse a form; its values are those of the unfused graph, within the tolerance."""
    single, double = subject(form, dtype, heads_first), subject(form, torch.float64, heads_first, values=dtype)
    step = single.specialise(())
    fused = fuse(step)
    slots = slots_of(step)
    exact = double.run(double.specialise(()), slots)
    assert_within(single.run(fused.step, slots), single.run(step, slots), exact)
    return fused


def rotary_calls(graph: Any) -> list[Any]:
    return graph.find_nodes(op="call_function", target=torch.ops.harmonica.norm_rotary.default)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        member(name, dtype, id=f"{name}-{dtype}", always=dtype == torch.bfloat16 or name in ("flux", "written"))
        for name in FORMS
        for dtype in (torch.float32, torch.bfloat16)  # with casts between in half types
    ],
)
def test_one_call_prepares_queries_and_keys(name: str, dtype: torch.dtype) -> None:
    fused = check(*FORMS[name][:1], dtype, FORMS[name][1])
    (call,) = rotary_calls(fused.step.graph)
    assert fused.counts["norm_rotary"] == 1
    assert fused.counts["queries or keys left"] == fused.counts["norms left"] == 0
    parts, counts = call.args[:2]
    joined_outside = name in ("in_their_dtype", "written", "across_heads")  # by `cat`, with nothing before it
    assert counts == ([1, 1] if name in ("across_heads",) else [2, 2])
    assert len(parts) == sum(counts)
    left = {str(node.target) for node in fused.step.graph.nodes if node.op == "call_function"}
    assert not any(word in one for one in left for word in ("neg", "stack", "rsqrt", "rms_norm", "scatter"))
    assert joined_outside or sum("aten.cat" in one for one in left) <= 1  # of the values


def twice(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first rotation stands before, but is found after the one that attention takes; both make the same views."""
    first = apply_rotary_emb(joined(m, text, image), (cos, sin), sequence_dim=1).relu()
    return apply_rotary_emb(m.own(first), (cos, sin), sequence_dim=1)


def test_calls_share_the_views_of_tables_wherever_they_stand() -> None:
    fused = check(twice, torch.bfloat16, False)
    calls = rotary_calls(fused.step.graph)
    assert [len(call.args[1]) for call in calls] == [1, 2, 1] or [len(call.args[1]) for call in calls] == [1, 1, 2]
    whole = {
        table
        for call in calls
        for tables in call.args[4:6]
        for table in tables
        if table.meta["val"].shape[1] > TEXT + 9
    }
    assert len(whole) == 2


class Cross(nn.Module):
    """Attention of an image to a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(query_dim=32, cross_attention_dim=32, heads=2, dim_head=16, qk_norm="rms_norm")

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return x + self.attn(x, prompt)


def test_keys_that_are_computed_once_stay_in_the_prologue() -> None:
    """Together with the queries they would be computed in every step."""
    torch.manual_seed(0)
    found = Subject.of(Cross(), {"x": normal(2, 4, 32), "prompt": normal(2, 3, 32)}, ["attn"], torch.float32)
    plan = build_plan(found.captured, Schedule.all_compute(steps=2, sites=["attn"]))
    lowering = FusedLowering(plan, [Role.LATENTS, Role.REQUEST])
    (call,) = rotary_calls(lowering.programs[0].step.graph)
    assert len(call.args[0]) == 1
    everything = rotary_calls(fuse(found.specialise(())).step.graph)
    assert [len(each.args[0]) for each in everything] == [2]


def other_angles(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not a rotation: the second number of a pair has other sines."""
    x = joined(m, text, image)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, ::2], sin[:, None, ::2]
    return torch.stack([a * c - b * s, a * c + b * s], dim=-1).flatten(-2)


def wrong_sign(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, text, image)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos[:, None] + torch.stack([b, -a], dim=-1).flatten(-2) * sin[:, None]


def wrong_order(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, text, image)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def of_something_else(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, text, image)
    return x * cos[:, None] + sliced(x.relu()) * sin[:, None]


@pytest.mark.parametrize("form", [other_angles, wrong_sign, wrong_order, of_something_else])
def test_what_only_looks_like_a_rotation_stays(form: Any) -> None:
    fused = check(form, torch.float32, False)
    assert fused.counts["norm_rotary"] == 0


def used_elsewhere(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = m.own(image)
    return apply_rotary_emb(joined(m, m.of_text(text), normed), (cos, sin), sequence_dim=1) + normed.mean()


def fine_tables(m: Joint, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = joined(m, m.of_text(text), m.own(image))
    return (x * cos[:, None].double() + sliced(x) * sin[:, None].double()).type_as(x)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (used_elsewhere, "queries or keys: something between is used elsewhere"),
        (fine_tables, "queries or keys: the dtype or device of cos or sin"),
    ],
)
def test_what_is_left_is_counted_with_its_reason(form: Any, reason: str) -> None:
    fused = check(form, torch.float32, False)
    assert fused.counts["norm_rotary"] == 0
    assert fused.counts["queries or keys left"] == 2
    assert fused.reasons[reason] == 2
