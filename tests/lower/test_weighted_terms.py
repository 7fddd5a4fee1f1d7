"""Weighted sums in fused step graphs: where they become terms of residuals, and where `forecast` computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from harmonica_rt.graph.weighted_sum import weighted_sum
from harmonica_rt.indices import SiteIndex
from harmonica_rt.lower.fuse import MOST_CACHES, FusedStep, _parts, fuse
from harmonica_rt.lower.plain import with_stores
from harmonica_rt.lower.regions import whole
from harmonica_rt.lower.weighted_terms import Term
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.plan.step_graph import ProgramGraph
from tests.lower.test_fuse import TOKENS, WIDTH, Body, Subject, assert_within, body, normal

WEIGHTS = torch.tensor([[1.75, -0.5, -0.375, 0.1], [2.5, -2.0, 0.25, 0.3]])  # of attn, of ff
CALLS = ("forecast", "gated_residual", "residual_reuse", "residual_reuse_norm_modulate")


def step_of(subject: Subject, taken: dict[int, int]) -> ProgramGraph:
    """A step that reuses these sites as weighted sums of so many values."""
    pairs = frozenset((SiteIndex(site), count) for site, count in taken.items())
    return specialise(subject.captured, Pattern(frozenset(map(SiteIndex, taken)), frozenset(), pairs))


@torch.no_grad()
def run(subject: Subject, step: ProgramGraph) -> list[Tensor]:
    named = dict(subject.model.named_parameters())
    slots = [normal(*node.meta["val"].shape, index + 1) for index, node in enumerate(step.read_nodes)]
    results, _ = fx.GraphModule(subject.captured.root, step.graph)(
        *(named[name] for name in step.parameters),
        *(subject.call.leaves[index] for index in step.inputs),
        *[WEIGHTS] * len(step.hoisted),
        *(like(node.meta["val"], slot) for node, slot in zip(step.read_nodes, slots, strict=True)),
    )
    return list(results)


def like(value: Tensor, slot: Tensor) -> Tensor:
    """The slot's numbers, laid out as the value that the graph expects."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(slot[..., 0])


def check(form: Callable[..., Any], taken: dict[int, int], dtype: torch.dtype = torch.float32) -> FusedStep:
    """Fuse the step of a form; the result is that of the unfused step, up to rounding."""
    subject, double = body(form, dtype), body(form, torch.float64, values=dtype)
    step = step_of(subject, taken)
    fused = fuse(step)
    assert fused.step.hoisted == step.hoisted
    truth = run(double, step_of(double, taken))
    got, eager = run(subject, fused.step), run(subject, step)
    assert_within(got, eager, truth)
    return fused


def there(fused: FusedStep) -> dict[str, int]:
    """The calls in a fused step, which are those counted."""
    names = [str(node.target).split(".")[1] for node in fused.step.graph.nodes if "harmonica" in str(node.target)]
    found = {name: names.count(name) for name in CALLS if name in names}
    assert {name: n for name, n in fused.counts.items() if n and not name.endswith("left")} == found
    assert fused.counts["weighted sums left"] == sum(node.target is weighted_sum for node in fused.step.graph.nodes)
    return found


def chain(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    return x + g * m.attn(x) + h * m.ff(x)


def before_a_norm(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    x = x + g * m.attn(x)
    hidden = x + m.ff(x)
    return m.plain(hidden) * (1 + s) + b, hidden


def alone(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    return x + m.attn(x), m.ff(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize(("form", "op"), [(chain, "residual_reuse"), (before_a_norm, "residual_reuse_norm_modulate")])
def test_sums_of_a_chain_are_terms_of_one_call(form: Any, op: str, first: int, dtype: torch.dtype) -> None:
    fused = check(form, {0: first, 1: 3}, dtype)
    assert there(fused) == {op: 1}
    [node] = [node for node in fused.step.graph.nodes if "harmonica" in str(node.target)]
    weighting = node.kwargs if op.endswith("modulate") else dict(zip(("weights", "places", "counts"), node.args[3:]))  # noqa: B905
    assert weighting["places"] == [*range(first), 4, 5, 6]
    assert weighting["counts"] == [first, 3]


def test_fp32_sums_have_the_bits_of_eager_ones() -> None:
    subject = body(chain, torch.float32)
    step = step_of(subject, {0: 2, 1: 4})
    assert all(map(torch.equal, run(subject, fuse(step).step), run(subject, step)))


@pytest.mark.parametrize(("taken", "op"), [({0: 1}, "gated_residual"), ({0: 2}, "residual_reuse")])
def test_a_single_sum_without_a_gate(taken: dict[int, int], op: str) -> None:
    assert there(check(alone, taken)) == {op: 1}


def test_terms_with_and_without_weights_in_one_call() -> None:
    fused = check(chain, {0: 2})
    assert there(fused) == {"residual_reuse": 1}
    [node] = [node for node in fused.step.graph.nodes if "harmonica" in str(node.target)]
    assert node.args[4:] == ([0, 1, -1], [2, 1])


def twice(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    y = m.attn(x)
    return x + g * y, x.relu() + s * y, m.ff(x)


def two_ways(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    y = m.attn(x)
    return x + g * y, y.sin(), m.ff(x)


def its_own_gate(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    y = m.attn(x)
    return x + y * y, m.ff(x)


def its_own_x(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    y = m.attn(x)
    return y + g * y, m.ff(x)


def onto_another(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    return m.attn(x) + g * m.ff(x)


def bare(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    return m.attn(x), x + g * m.ff(x)


def widened(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    return x.double() + m.attn(x).double(), m.ff(x)


def halves(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    first, second = m.attn(x).split([5, TOKENS - 5], dim=1)
    return x[:, :5] + g * first, x[:, 5:] + h * second, m.ff(x)


def copied(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
    y = m.attn(x).transpose(1, 2).reshape(2, TOKENS, WIDTH)
    return x + g * y, m.ff(x)


@pytest.mark.parametrize(
    ("form", "taken", "expected"),
    [
        pytest.param(twice, {0: 2}, {"residual_reuse": 2}, id="two readers of two values"),
        pytest.param(twice, {0: 4}, {"forecast": 1, "gated_residual": 2}, id="two readers of four"),
        pytest.param(two_ways, {0: 2}, {"forecast": 1, "gated_residual": 1}, id="a reader that is no residual"),
        pytest.param(its_own_gate, {0: 2}, {"forecast": 1, "gated_residual": 1}, id="a gate of its own"),
        pytest.param(its_own_x, {0: 2}, {"forecast": 1, "gated_residual": 1}, id="added to itself"),
        pytest.param(onto_another, {0: 2, 1: 2}, {"forecast": 1, "residual_reuse": 1}, id="added to another"),
        pytest.param(bare, {0: 3, 1: 2}, {"forecast": 1, "residual_reuse": 1}, id="a result"),
        pytest.param(widened, {0: 2}, {"forecast": 1}, id="rounded before it is added"),
        pytest.param(halves, {0: 2}, {"residual_reuse": 2}, id="views of it"),
        pytest.param(halves, {0: 4}, {"residual_reuse": 2}, id="views of four"),
        pytest.param(copied, {0: 2}, {"forecast": 1, "gated_residual": 1}, id="copied before it is added"),
    ],
)
def test_sums_are_computed_once_where_that_is_cheaper(
    form: Any, taken: dict[int, int], expected: dict[str, int]
) -> None:
    assert there(check(form, taken)) == expected


def test_a_step_with_weights_may_be_compiled_whole() -> None:
    """Regions take no weighted sum, as they take no operator of ours, but a step program in one piece does."""
    step = fuse(step_of(body(bare, torch.float32), {0: 3, 1: 2})).step
    region = whole(step, with_stores(step, direct=False))
    assert region is not None
    assert len(region.inputs) == len(step.argument_nodes)


def test_strides_stay() -> None:
    """A site whose result is a transposed view, and one whose result repeats a row."""

    def strided(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
        return m.attn(x).transpose(0, 1).contiguous().view(TOKENS, -1), F.relu(m.ff(x))

    assert there(check(strided, {0: 2, 1: 3})) == {"forecast": 2}

    class Repeated(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :1].expand(2, TOKENS, WIDTH)

    subject = body(lambda m, x, *c: (x.sin() * m.attn(x), m.ff(x)), torch.float32)
    subject.model.attn = Repeated(WIDTH, WIDTH)
    subject = Subject.of(
        subject.model, dict(zip(("x", "c"), subject.call.leaves, strict=True)), ["attn"], torch.float32
    )
    fused = fuse(step_of(subject, {0: 2}))
    assert there(fused) == {}
    assert fused.counts["weighted sums left"] == 1
    assert fused.reasons == {"weighted sum: its dtype or its layout is none that the operator makes": 1}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 16, [16]),
        ([1] * 18, [9, 9]),
        ([2] * 8, [16]),
        ([2] * 9, [10, 8]),
        ([4] * 9, [12, 12, 12]),
        ([3] * 6, [9, 9]),
        ([4, 1, 1, 1, 4, 4, 4], [11, 8]),
        ([20], [20]),
    ],
)
def test_a_long_chain_is_split_between_residuals(sizes: Sequence[int], expected: list[int]) -> None:
    graph = fx.Graph()
    node = graph.placeholder("slot")
    terms = [Term(None, (node,) * size) for size in sizes]
    parts = _parts(terms)
    assert [term for part in parts for term in part] == terms
    lengths = [sum(len(term.caches) for term in part) for part in parts]
    assert lengths == expected
    assert max(lengths) <= max(MOST_CACHES, *sizes)
