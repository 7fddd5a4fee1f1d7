"""Linear layers of one input as one product: the same values, only where it pays, and only where nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from harmonica_rt import Schedule
from harmonica_rt.lower import joining_rule
from harmonica_rt.lower.graph_states import BodyGraph
from harmonica_rt.lower.joined_products import Join, with_joins
from harmonica_rt.lower.joining_rule import choose_joins
from harmonica_rt.lower.plain import Program
from tests.lower.test_regions import bodies
from tests.models import Attention, attending, stack_call

WIDTH = 16
LINEAR = torch.ops.aten.linear.default


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join on a CPU by the rule for GPUs."""
    monkeypatch.setattr(joining_rule, "DEVICES", joining_rule.DEVICES | {"cpu"})


def bodies_of(model: nn.Module, schedule: Schedule | None = None) -> tuple[Any, Sequence[BodyGraph]]:
    """The plan, and its bodies; without a schedule, one that computes everything."""
    dtype = next(model.parameters()).dtype
    call = {name: value.to(dtype) for name, value in stack_call(0, width=WIDTH).items()}
    return bodies(model, call, schedule or Schedule.all_compute(steps=2, sites=attentions(model)))


def attentions(model: nn.Module) -> list[str]:
    return [f"blocks.{index}.attn" for index in range(len(model.blocks))]  # type: ignore[arg-type]


def layers(joins: Sequence[Join]) -> list[int]:
    return [len(join.layers) for join in joins]


def joins_of(model: nn.Module, schedule: Schedule | None = None) -> tuple[Join, ...]:
    plan, found = bodies_of(model, schedule)
    return choose_joins(found, [len(plan.steps)] * len(found))


def run(body: BodyGraph, plan: Any, model: nn.Module, joins: Sequence[Join]) -> torch.Tensor:
    """What a body that computes everything returns."""
    parameters = dict(model.named_parameters())
    call = stack_call(0, width=WIDTH)
    made = {
        tensor.name: torch.cat([parameters[name] for name in tensor.parameters])
        for join in joins
        for tensor in join.tensors
    }
    torch.manual_seed(1)
    values = {name: torch.randn(2, 1, WIDTH) for name in body.hoisted if name not in made}
    hoisted = [{**made, **values}[name] for name in body.hoisted]
    leaves = [call["latents"], call["timestep"]]
    with torch.no_grad():
        (output,) = Program(body, plan.captured.root)(
            body.bind(parameters, plan.captured.constants), leaves, [], [], hoisted
        )
    return output


@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_are_one_product_with_the_same_values(bias: bool) -> None:
    model = attending(bias=bias)
    plan, (body,) = bodies_of(model)
    joins = choose_joins([body], [2])
    assert layers(joins) == [3, 3]
    assert [len(join.tensors) for join in joins] == [1 + bias] * 2
    joined = with_joins(body, joins)
    assert len(body.graph.find_nodes(op="call_function", target=LINEAR)) == 2 * 6
    assert len(joined.graph.find_nodes(op="call_function", target=LINEAR)) == 2 * 4
    torch.testing.assert_close(run(joined, plan, model, joins), run(body, plan, model, joins))


def test_the_tables_name_what_the_joined_body_takes() -> None:
    model = attending(depth=1)
    _, (body,) = bodies_of(model)
    joins = choose_joins([body], [2])
    joined = with_joins(body, joins)
    projections = {f"blocks.0.attn.to_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")}
    assert set(body.parameters) - set(joined.parameters) == projections
    assert {name for tensor in joins[0].tensors for name in tensor.parameters} == projections
    assert joined.hoisted == (*body.hoisted, *(tensor.name for tensor in joins[0].tensors))
    assert sum(tensor.nbytes for tensor in joins[0].tensors) == 3 * (WIDTH + 1) * WIDTH * 4


def test_a_parameter_that_something_else_takes_stays() -> None:
    model = attending(depth=2)
    model.blocks[1].attn.to_out.weight = model.blocks[0].attn.to_q.weight
    _, (body,) = bodies_of(model)
    joined = with_joins(body, choose_joins([body], [2]))
    left = [name for name in joined.parameters if name.endswith(("to_q.weight", "blocks.1.attn.to_out.weight"))]
    assert len(left) == 1


class TestPartialSteps:
    def test_a_joined_product_vanishes_with_the_work_that_is_skipped(self) -> None:
        model = attending()
        schedule = Schedule.every(2, steps=4, sites=["blocks.0.attn", "blocks.1.attn"])
        _, (full, partial) = bodies_of(model, schedule)
        joins = choose_joins([full, partial], [2, 2])
        assert layers(joins) == [3, 3]
        assert with_joins(partial, joins) is partial
        assert with_joins(full, joins).hoisted != full.hoisted

    @pytest.mark.parametrize("site", ["to_q", "to_k"])
    def test_a_layer_that_is_stored_stays_and_so_do_the_others_where_it_is_reused(self, site: str) -> None:
        model = attending(depth=1)
        schedule = Schedule.every(2, steps=4, sites=[f"blocks.0.attn.{site}"])
        _, (full, partial) = bodies_of(model, schedule)
        assert (len(full.stores), len(partial.reads)) == (1, 1)
        joins = choose_joins([full, partial], [2, 2])
        assert layers(joins) == [2]
        assert f"{site}.weight" not in joins[0].tensors[0].parameters[0] + joins[0].tensors[0].parameters[1]
        for body in (full, partial):
            assert len(with_joins(body, joins).hoisted) == len(body.hoisted) + 2

    def test_a_layer_belongs_to_one_join(self) -> None:
        """Where a step computes only two of three layers, it computes them one by one."""
        model = attending(depth=1)
        reused = Schedule.from_array([[1], [0], [1], [1]], sites=["blocks.0.attn.to_q"])
        _, found = bodies_of(model, reused)
        whole = next(body for body in found if not body.stores and not body.reads)
        joins = choose_joins(found, [1, 1, 2])
        assert layers(joins) == [3]
        assert [with_joins(body, joins) is body for body in found] == [body is not whole for body in found]


class TestRule:
    @pytest.mark.parametrize(
        ("rows", "width", "joined"),
        [
            (512, 1152, True),  # DiT-XL/2 at 256 x 256, one image, guided: 1 wave of 3
            (4096, 1152, True),  # 8 images: 7 of 9
            (2048, 1152, True),  # at 512 x 512: 4 of 6
            (8192, 1152, False),  # PixArt at 1024 x 1024: 14 of 15
            (4608, 3072, False),  # Flux at 1024 x 1024: 20 of 21
            (8192, 1536, False),  # SD3 at 1024 x 1024: 18 of 18
        ],
    )
    def test_large_products_stay_single(self, rows: int, width: int, joined: bool) -> None:
        single, together = joining_rule.waves(rows, width), joining_rule.waves(rows, 3 * width)
        assert (together / (3 * single) <= joining_rule.MOST_WAVES) is joined

    def test_parameters_are_joined_up_to_a_limit(self) -> None:
        _, (body,) = bodies_of(attending(depth=3))
        one = sum(tensor.nbytes for tensor in choose_joins([body], [2])[0].tensors)
        assert layers(choose_joins([body], [2], limit=2 * one)) == [3, 3]
        assert layers(choose_joins([body], [2], limit=one - 1)) == []

    def test_one_step_is_not_worth_a_copy(self) -> None:
        _, (body,) = bodies_of(attending())
        assert choose_joins([body], [1]) == ()

    def test_nothing_is_joined_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert joins_of(attending()) == ()
        assert {"cuda", "meta"} == joining_rule.DEVICES


class Variant(Attention):
    """Attention with something between projections and attention."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class WithNorm(Variant):
    """A norm reads the queries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        query = self.norm(self.to_q(x))
        return self.to_out(query * self.to_k(x) * self.to_v(x))  # type: ignore[no-any-return]


class WithCopy(Variant):
    """Queries are flattened to rows of all heads, which gaps do not allow without a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        query = self.to_q(x).flatten(1).relu().view(x.shape)
        return self.to_out(query * self.to_k(x) * self.to_v(x))  # type: ignore[no-any-return]


class WithGelu(Variant):
    """The product applies a GELU to the queries itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        return self.to_out(nn.functional.gelu(self.to_q(x)) * self.to_k(x) * self.to_v(x))  # type: ignore[no-any-return]


class WithStrides(Variant):
    """Something reads memory by given strides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        out = self.to_q(x) * self.to_k(x) * self.to_v(x)
        return self.to_out(out.as_strided(x.shape, x.stride()))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "expected"), [(WithNorm, [2]), (WithCopy, [2]), (WithGelu, [2]), (WithStrides, [])])
def test_what_does_not_fit_stays(kind: type[Variant], expected: list[int]) -> None:
    torch.manual_seed(0)
    model = attending(depth=1)
    model.blocks[0].attn = kind().eval()
    plan, (body,) = bodies_of(model)
    joins = choose_joins([body], [2])
    assert layers(joins) == expected
    joined = with_joins(body, joins)
    torch.testing.assert_close(run(joined, plan, model, joins), run(body, plan, model, joins))


def test_layers_of_unaligned_width_stay() -> None:
    model = attending(depth=1)
    for name in ("to_q", "to_k", "to_v"):
        setattr(model.blocks[0].attn, name, nn.Linear(WIDTH, 6))
    model.blocks[0].attn.to_out = nn.Linear(6, WIDTH)
    assert joins_of(model) == ()


def test_a_layer_whose_bias_is_broadcast_stays() -> None:
    model = attending(depth=1)
    for name in ("to_q", "to_k", "to_v"):
        getattr(model.blocks[0].attn, name).bias = nn.Parameter(torch.ones(1))
    assert joins_of(model) == ()


def test_layers_with_and_without_bias_are_joined_apart() -> None:
    model = attending(depth=1)
    model.blocks[0].attn.to_k.bias = None
    model.blocks[0].attn.to_q.bias = None
    (join,) = joins_of(model)
    assert [tensor.parameters for tensor in join.tensors] == [
        ("blocks.0.attn.to_q.weight", "blocks.0.attn.to_k.weight")
    ]
