"""Fused step graphs against unfused ones: values, counts, and what has to stay as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers as d
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from harmonica_rt import find_sites
from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.indices import SiteIndex, SiteOutput
from harmonica_rt.lower.fuse import FusedStep, fuse
from harmonica_rt.parity.tolerance import Error, limit_from, same_bits
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.plan.step_graph import StepGraph, check_step_graph
from tests.tiers import member
from tests.tiny import families, randomised

TOKENS, WIDTH = 65, 24  # enough values that the largest error of two roundings is about the same
OPS = ("gated_residual", "norm_rotary", "residual_reuse", "residual_reuse_norm_modulate")


@dataclass(frozen=True)
class Subject:
    """A captured model, with the means to run its step graphs."""

    model: nn.Module
    call: Call
    captured: CapturedGraph

    @classmethod
    def of(cls, model: nn.Module, kwargs: dict[str, Any], sites: Sequence[str], dtype: torch.dtype) -> Subject:
        model = model.eval().to(dtype)
        call = CallConvention(model).normalise((), pytree.tree_map(lambda leaf: cast(leaf, dtype), kwargs))
        return cls(model, call, capture(model, call, sites))

    def specialise(self, reuse: Sequence[int], store: Sequence[int] = ()) -> StepGraph:
        stored = [
            SiteOutput(SiteIndex(site), k) for site in store for k in range(len(self.captured.site_outputs[site]))
        ]
        return specialise(self.captured, Pattern(frozenset(map(SiteIndex, reuse)), frozenset(stored)))

    @torch.no_grad()
    def run(self, step: StepGraph, slots: dict[str, Tensor]) -> list[Tensor]:
        """Outputs and stored values of one step."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        results, stored = fx.GraphModule(self.captured.root, step.graph)(
            *(named[name] for name in step.parameters),
            *(self.captured.constants[name] for name in step.constants),
            *(self.call.leaves[index] for index in step.inputs),
            *(slots[node.name].to(node.meta["val"].dtype) for node in step.read_nodes),
        )
        return [*results, *stored]


def cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def slots_of(step: StepGraph) -> dict[str, Tensor]:
    """What to put into the slots of `step`, and of the same step in another dtype."""
    return {node.name: normal(*node.meta["val"].shape).to(node.meta["val"].dtype) for node in step.read_nodes}


def calls(fused: FusedStep) -> dict[str, int]:
    """Fused calls that are there, checked against what was counted."""
    names = [str(node.target).split(".")[1] for node in fused.step.graph.nodes if "harmonica" in str(node.target)]
    there = {name: names.count(name) for name in OPS}
    assert {name: fused.counts[name] for name in OPS} == there
    return {name: n for name, n in there.items() if n}


def assert_within(got: Sequence[Any], eager: Sequence[Any], truth: Sequence[Any]) -> None:
    """The tolerance rule, over all values of a step together."""
    for a, b in zip(got, eager, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    flat = [torch.cat([value.reshape(-1) for value in values]) for values in (got, eager, truth)]
    error, limit = Error.between(flat[0], flat[2]), limit_from(flat[1], flat[2])
    assert error.within(limit), (error, limit)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "dit": lambda: {
        "hidden_states": normal(2, 4, 4, 4),
        "timestep": torch.tensor([7, 7]),
        "class_labels": torch.tensor([1, 2]),
    },
    "pixart-alpha": lambda: {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 12),
        "timestep": torch.tensor([7, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    "sd3": lambda: {
        "hidden_states": normal(2, 16, 8, 8),
        "encoder_hidden_states": normal(2, 5, 12),
        "pooled_projections": normal(2, 10),
        "timestep": torch.tensor([7.0, 7.0]),
    },
    "flux": lambda: {
        "hidden_states": normal(1, 16, 4),
        "encoder_hidden_states": normal(1, 5, 12),
        "pooled_projections": normal(1, 10),
        "timestep": torch.tensor([0.75]),
        "img_ids": torch.arange(48.0).view(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.5]),
    },
}


@functools.cache
def family(name: str, dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    model = families()[name].build().transformer
    kwargs = {**CALLS[name](), "return_dict": False}
    return Subject.of(model, kwargs, find_sites(model), dtype)


@pytest.mark.parametrize("name", CALLS)
@settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture seeds, and nothing here draws from that
@given(data=st.data())
def test_fused_equals_unfused_up_to_rounding(name: str, data: st.DataObject) -> None:
    single, double = family(name, torch.float32), family(name, torch.float64)
    sites = len(single.captured.sites)
    kinds = data.draw(st.lists(st.sampled_from(["reuse", "store", "compute"]), min_size=sites, max_size=sites))
    reuse, store = ([i for i, each in enumerate(kinds) if each == kind] for kind in ("reuse", "store"))
    step, truth = single.specialise(reuse, store), double.specialise(reuse, store)
    before = str(step.graph)
    fused = fuse(step)
    assert str(step.graph) == before
    assert fused.step.reads == step.reads
    assert fused.step.stores == step.stores
    check_step_graph(fused.step)
    assert fused.counts["residuals left"] == 0
    slots = slots_of(step)
    exact = double.run(truth, slots)
    assert_within(single.run(fused.step, slots), single.run(step, slots), exact)
    for a, b in zip(double.run(fuse(truth).step, slots), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# the calls of a step that reuses all, and of one that computes all
KNOWN: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    # the last norm takes the run in
    "dit": ({"residual_reuse_norm_modulate": 1}, {"residual_reuse_norm_modulate": 4}),
    # attn1 is followed by attn2, which reads the sum without a norm
    "pixart-alpha": (
        {"residual_reuse_norm_modulate": 1},
        {"gated_residual": 2, "residual_reuse_norm_modulate": 4},
    ),
    # text has no sub-layer after the last attention that would make its residuals needed
    "sd3": ({"residual_reuse_norm_modulate": 1}, {"residual_reuse_norm_modulate": 10, "norm_rotary": 4}),
    # image and text streams meet in `cat`, single blocks take apart and join what they add to
    "flux": (
        {"residual_reuse": 2, "gated_residual": 2},
        {"residual_reuse_norm_modulate": 6, "gated_residual": 4, "norm_rotary": 4},
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        member(name, dtype, id=f"{name}-{dtype}", always=dtype == torch.float32 or name in ("dit", "pixart-alpha"))
        for name in KNOWN
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_calls_of_known_steps(name: str, dtype: torch.dtype) -> None:
    subject, (reused, computed) = family(name, dtype), KNOWN[name]
    for sites, expected in ((range(len(subject.captured.sites)), reused), ((), computed)):
        fused = fuse(subject.specialise(sites))
        assert calls(fused) == expected
        assert fused.counts["residuals left"] == 0
        assert fused.counts["norms left"] == sum(fused.reasons.values())


@pytest.mark.parametrize(("blocks", "lengths"), [(6, [12]), (9, [9, 9])])
def test_a_long_run_is_split_evenly(blocks: int, lengths: list[int]) -> None:
    model = d.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        sample_size=4,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    )
    subject = Subject.of(randomised(model), CALLS["dit"](), find_sites(model), torch.float32)
    step = subject.specialise(range(2 * blocks))
    fused = fuse(step)
    nodes = [node for node in fused.step.graph.nodes if "harmonica" in str(node.target)]
    assert [len(node.args[1]) for node in nodes] == lengths
    assert nodes[-1].target is torch.ops.harmonica.residual_reuse_norm_modulate.default
    assert sum(calls(fused).values()) == len(lengths)
    slots = slots_of(step)
    for a, b in zip(subject.run(fused.step, slots), subject.run(step, slots), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Rms(nn.Module):
    """RMSNorm as most models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class WideNorm(nn.LayerNorm):
    """LayerNorm in fp32, given back in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (WIDTH,), self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Body(nn.Module):
    """Two sites and norms of every kind, put together by a function `form(body, x, c)`.

    `x` is [2, TOKENS, WIDTH]; `c` [2, 4, 1, WIDTH] holds two gates, a scale and a shift.
    """

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.attn, self.ff = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.wide = nn.LayerNorm(WIDTH), WideNorm(WIDTH)
        self.plain, self.rms, self.own_rms = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.RMSNorm(WIDTH), Rms()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.form = form

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return self.form(self, x, *c.unbind(1))


def body(form: Callable[..., Any], dtype: torch.dtype, values: torch.dtype | None = None) -> Subject:
    """A captured `Body` in `dtype`, its weights and inputs rounded to `values`, by default to `dtype` as well."""
    torch.manual_seed(0)
    values = values or dtype
    inputs = {"x": normal(2, TOKENS, WIDTH), "c": normal(2, 4, 1, WIDTH)}
    inputs = {name: value.to(values) for name, value in inputs.items()}
    return Subject.of(Body(form).to(values), inputs, ["attn", "ff"], dtype)


def check(
    form: Callable[..., Any], expected: dict[str, int], dtype: torch.dtype, reuse: Sequence[int] = ()
) -> FusedStep:
    """Fuse `form` with the given sites reused and all others stored; calls and values are as expected."""
    store = [site for site in (0, 1) if site not in reuse]
    subject, double = body(form, dtype), body(form, torch.float64, values=dtype)
    step = subject.specialise(reuse, store)
    fused = fuse(step)
    assert calls(fused) == expected
    slots = slots_of(step)
    exact = double.run(double.specialise(reuse, store), slots)
    eager = subject.run(step, slots)
    got = subject.run(fused.step, slots)
    for node, result in zip(pytree.arg_tree_leaves(fused.step.graph.output_node().args[0]), got, strict=True):
        assert node.meta["val"].stride() == result.stride()
    assert_within(got, eager, exact)
    return fused


RESIDUALS = {
    "x + gate * y": lambda m, x, g, h, s, b: x + g * m.attn(x),
    "x + y * gate": lambda m, x, g, h, s, b: x + m.attn(x) * g,
    "gate * y + x": lambda m, x, g, h, s, b: g * m.attn(x) + x,
    "expanded gate": lambda m, x, g, h, s, b: x + g.expand(2, TOKENS, WIDTH) * m.attn(x),
    "gate of a row": lambda m, x, g, h, s, b: x + g[0, 0] * m.attn(x),
    "idle casts": lambda m, x, g, h, s, b: (x.to(x.dtype) + g * m.attn(x).type_as(x)).to(x.dtype),
}


@pytest.mark.parametrize("reuse", [(), (0,)], ids=["computed", "reused"])
@pytest.mark.parametrize("form", RESIDUALS)
def test_a_residual_in_any_order(form: str, reuse: tuple[int, ...]) -> None:
    def two_sites(m: Body, x: Tensor, *c: Tensor) -> Any:
        return RESIDUALS[form](m, x, *c).relu() + m.ff(x)

    subject = body(two_sites, torch.float32)
    step = subject.specialise(reuse, [0] if not reuse else [])
    fused = fuse(step)
    assert calls(fused) == {"gated_residual": 1}  # an addition alone stays one
    slots = slots_of(step)
    assert all(map(same_bits, subject.run(fused.step, slots), subject.run(step, slots)))


ONE = {"residual_reuse_norm_modulate": 1}
NORMS = {
    "modulated": lambda m, h, s, b: m.norm(h) * (1 + s) + b,
    "shift first": lambda m, h, s, b: b + (s + 1) * m.plain(h),
    "views above the one": lambda m, h, s, b: (
        m.plain(h) * (s[:, 0] + 1)[:, None].expand(2, TOKENS, WIDTH) + b[:, 0].unsqueeze(1)
    ),
    "scale only": lambda m, h, s, b: m.norm(h) * (1 + s),
    "no modulate": lambda m, h, s, b: m.norm(h),
    "shift that is no shift": lambda m, h, s, b: m.norm(h) + b,
    "factor that is no scale": lambda m, h, s, b: m.norm(h) * s + b,
    "shift of every token": lambda m, h, s, b: m.norm(h) * (1 + s) + b.expand(2, TOKENS, WIDTH).contiguous(),
    "cast around the norm": lambda m, h, s, b: m.wide(h) * (1 + s) + b,
    "cast around all": lambda m, h, s, b: (m.wide(h).float() * (1 + s.float()) + b.float()).type_as(h),
    "rms": lambda m, h, s, b: m.rms(h) * (1 + s) + b,
    "rms written out": lambda m, h, s, b: m.own_rms(h) * (1 + s) + b,
    "rms with the mean's dtype": lambda m, h, s, b: (
        h * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-6)
    ).to(h.dtype),
}


IN_HALF = (
    "modulated",
    "cast around the norm",
    "cast around all",
    "rms",
    "rms written out",
    "rms with the mean's dtype",
)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        member(form, dtype, id=f"{form}-{dtype}", always=dtype == torch.float32 or form in IN_HALF)
        for form in NORMS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_a_norm_behind_a_residual(form: str, dtype: torch.dtype) -> None:
    def last(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
        return NORMS[form](m, x + g * m.attn(x) + h * m.ff(x), s, b)

    def middle(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
        x = x + g * m.attn(x)
        return x + h * m.ff(NORMS[form](m, x, s, b))

    fused = check(last, ONE, dtype, reuse=(0, 1))
    assert fused.counts["norms left"] == 0
    check(middle, {**ONE, "gated_residual": 1}, dtype)


def scale_of_sum(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    x = x + g * m.attn(x)
    return m.plain(x) * (1 + x.mean(dim=1, keepdim=True)) + b, m.ff(x)


def scale_made_late(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    x = x + g * m.attn(x)
    tail = m.ff(x)
    return m.plain(x) * (1 + s.sin().cos()) + b.tanh(), tail


def two_sums_scale_each_other(m: Body, x: Tensor, g: Tensor, *c: Tensor) -> Any:
    first, second = x + g * m.attn(x), x + c[0] * m.ff(x)
    return m.plain(first) * (1 + second), m.plain(second) * (1 + first)


def two_readers_of_a_norm(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    n = m.plain(x + g * m.attn(x))
    return n * (1 + s) + b, m.ff(n * (1 + h) + b)


def two_norms_of_a_sum(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    x = x + g * m.attn(x)
    return m.plain(x) * (1 + s) + b, m.ff(m.norm(x))


def gated_site(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    gated = g * m.attn(x)
    x = x + gated
    return m.plain(x) * (1 + s), gated, m.ff(x)


def sums_in_between(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    first = x + g * m.attn(x)
    return first, first + h * m.ff(x)


def sum_twice(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    first = x + g * m.attn(x)
    return first + first * (1 + m.ff(x))


def transposed(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x = x + g * m.attn(x).transpose(1, 2).contiguous().transpose(1, 2)
    return x.transpose(1, 2).view(2, -1), x.transpose(1, 2).view(2, 2, -1).sin() + m.ff(x).sum()


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (scale_of_sum, ONE),
        (scale_made_late, ONE),
        (two_sums_scale_each_other, {"residual_reuse_norm_modulate": 2}),
        (two_readers_of_a_norm, ONE),
        (two_norms_of_a_sum, ONE),
        (gated_site, ONE),
        (sums_in_between, {"gated_residual": 2}),
        (sum_twice, {"gated_residual": 1}),
        (transposed, {"gated_residual": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("reuse", [(), (0,)], ids=["computed", "reused"])
def test_other_readers_get_what_they_got(form: Any, expected: dict[str, int], reuse: tuple[int, ...]) -> None:
    check(form, expected, torch.float32, reuse)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda m, x, g, h, s, b: (x + g.float() * m.attn(x)) * m.ff(x).mean(), "dtypes or devices differ"),
        (lambda m, x, g, h, s, b: torch.add(x, g * m.attn(x), alpha=2) * m.ff(x).mean(), None),
        (
            lambda m, x, g, h, s, b: torch.cat([x, x]).view(2, 2, TOKENS, WIDTH) + m.attn(x) * m.ff(x).mean(),
            "shape of the slot",
        ),
        (lambda m, x, g, h, s, b: x * s + x.roll(1) * b + m.attn(m.ff(x)).mean(), None),
    ],
    ids=["wide gate", "alpha", "broadcast site", "rotation"],
)
def test_what_is_no_residual_stays(form: Any, reason: str | None) -> None:
    fused = check(form, {}, torch.bfloat16, reuse=(0,))
    assert fused.counts["residuals left"] == (reason is not None)
    assert all(reason is not None and reason in key for key in fused.reasons)


@pytest.mark.parametrize(
    "form",
    [
        lambda m, x, g, h, s, b: F.layer_norm(x + g * m.attn(x), (TOKENS, WIDTH)),
        lambda m, x, g, h, s, b: F.layer_norm((x + g * m.attn(x)).float(), (WIDTH,)),
        lambda m, x, g, h, s, b: m.plain((x + g * m.attn(x)).sin()),
    ],
    ids=["two dimensions", "result stays wide", "not of the sum"],
)
def test_a_norm_that_does_not_fit_stays(form: Any) -> None:
    fused = check(lambda m, *c: form(m, *c) * m.ff(c[0]).mean(), {"gated_residual": 1}, torch.bfloat16)
    assert fused.counts["norms left"] == 1
    assert list(fused.reasons.values()) == [1]
