"""Models with one odd trait each: whatever they return, and however a site's result lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.models import Stack, stack, stack_call

STEPS = 6
Forward = Callable[[nn.Module, torch.Tensor], Any]


class Odd(nn.Module):
    """`tail` makes the output of what the site made of the latents."""

    def __init__(self, site: nn.Module, tail: Forward) -> None:
        super().__init__()
        self.site = site
        self.plain = nn.Linear(8, 8)
        self.tail = tail

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> Any:
        return self.tail(self, latents)


class Site(nn.Module):
    """A linear layer whose result is looked at in another way."""

    def __init__(self, view: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.view = view

    def forward(self, x: torch.Tensor) -> Any:
        return self.view(self.linear(x))


def odd(tail: Forward, view: Callable[[torch.Tensor], Any] = torch.tanh) -> Odd:
    torch.manual_seed(0)
    return Odd(Site(view), tail).eval()


def leaves(output: Any) -> list[Any]:
    return pytree.tree_leaves(output)


def same(a: Any, b: Any) -> bool:
    if pytree.tree_structure(a) != pytree.tree_structure(b):
        return False
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves(a), leaves(b), strict=True)
    )


# what the site computed and what the rest computes come together, so that neither is left out
LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], Any], Forward]] = {
    "stride 0": (
        lambda y: y.mean(-1, keepdim=True).expand(-1, -1, 8),
        lambda m, x: m.plain(x) + m.site(x),
    ),
    "stride 0 in the midst": (
        lambda y: y[:, :1].expand(-1, 4, -1),
        lambda m, x: m.plain(x) * m.site(x),
    ),
    "gaps": (lambda y: y[..., ::2], lambda m, x: m.plain(x)[..., :4] + m.site(x)),
    "transposed": (lambda y: y.transpose(1, 2), lambda m, x: m.plain(x) @ m.site(x)),
    "overlapping": (lambda y: y.unfold(1, 3, 1), lambda m, x: m.plain(x)[:, :2, :, None] + m.site(x)),
    "no elements": (lambda y: y[:, :0], lambda m, x: torch.cat([m.plain(x), m.site(x)], 1)),
    "a number": (lambda y: y.sum(), lambda m, x: m.plain(x) * m.site(x)),
    "integers": (lambda y: y.argmax(-1), lambda m, x: m.plain(x) * m.site(x)[..., None]),
    "booleans": (lambda y: y > 0, lambda m, x: m.plain(x) * m.site(x)),
    "complex": (
        lambda y: torch.view_as_complex(y.reshape(2, 4, 4, 2)),
        lambda m, x: m.plain(x) + torch.view_as_real(m.site(x)).flatten(-2),
    ),
    "several": (
        lambda y: (y.tanh(), {"b": [y.exp(), None]}),
        lambda m, x: (lambda a, rest: m.plain(x) * a + rest["b"][0])(*m.site(x)),
    ),
    "parts of one": (lambda y: y.chunk(2, -1), lambda m, x: m.plain(x)[..., :4] * m.site(x)[0] + m.site(x)[1]),
    "half precision": (lambda y: y.to(torch.bfloat16), lambda m, x: m.plain(x) + m.site(x)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_site_may_return_any_layout(layout: str) -> None:
    view, tail = LAYOUTS[layout]
    model, schedule = odd(tail, view), Schedule.every(3, steps=STEPS, sites=["site"])
    compiled, truth = hrt.compile(model, schedule, strict=True, debug=True), hrt.reference(model, schedule)
    for step in range(STEPS):
        got, expected = compiled(**stack_call(step)), truth(**stack_call(step))
        assert same(got, expected)
        assert not got.isnan().any()
    reused = not torch.equal(got, model(**stack_call(STEPS - 1)))
    assert reused is (layout != "no elements")


OUTPUTS: dict[str, Forward] = {
    "the site's own": lambda m, x: m.site(x),
    "a view of the site's": lambda m, x: m.site(x).transpose(1, 2)[..., ::2],
    "expanded": lambda m, x: m.site(x).unsqueeze(0).expand(3, -1, -1, -1),
    "pieces": lambda m, x: torch.chunk(m.site(x), 2, -1),
    "the site's twice": lambda m, x: (lambda y: (y, y))(m.site(x)),
    "a reshape that is a view": lambda m, x: m.site(x).reshape(2, -1),
    "a cast that is none": lambda m, x: m.site(x).to(torch.float32).contiguous(),
    "latents and weights": lambda m, x: (m.site(x), x, m.plain.weight, x[:1]),
    "nested": lambda m, x: {"a": [m.site(x), None, 3], "b": (m.plain(x), "text")},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_equal_and_the_callers_to_keep_and_to_change(kind: str) -> None:
    model, schedule = odd(OUTPUTS[kind]), Schedule.every(3, steps=STEPS, sites=["site"])
    compiled, truth = hrt.compile(model, schedule, strict=True, debug=True), hrt.reference(model, schedule)
    weight = model.plain.weight.clone()
    kept: list[tuple[Any, Any]] = []
    for _ in range(2):
        compiled.reset()
        truth.reset()
        for step in range(STEPS):
            kept.append((compiled(**stack_call(step)), truth(**stack_call(step))))
    assert all(same(got, expected) for got, expected in kept)

    compiled.reset()
    truth.reset()
    for step in range(STEPS):  # what the caller does to an output, no later step may see
        got = compiled(**stack_call(step))
        assert same(got, truth(**stack_call(step)))
        for leaf in leaves(got):
            if isinstance(leaf, torch.Tensor) and 0 not in leaf.stride():
                leaf.detach().fill_(torch.nan)
        assert torch.equal(model.plain.weight, weight)


class Calls(nn.Module):
    """A number of calls of one site in a forward, all with other inputs."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.site = nn.Linear(8, 8)
        self.times = times

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = latents
        for index in range(self.times):
            x = x.tanh() * self.site(latents + index)
        return x


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_site_that_runs_several_times_keeps_each_result(times: int) -> None:
    torch.manual_seed(0)
    model, schedule = Calls(times).eval(), Schedule.every(3, steps=STEPS, sites=["site"])
    compiled = hrt.compile(model, schedule, strict=True, debug=True)
    for step in range(STEPS):
        latents = stack_call(step)["latents"]
        expected, source = latents, stack_call(step - step % 3)["latents"]
        for index in range(times):
            expected = expected.tanh() * model.site(source + index)
        assert torch.equal(compiled(**stack_call(step)), expected)


class Writes(nn.Module):
    """Changes in place: `what` names the tensor."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.site = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))
        self.what = what

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.what == "buffer":
            self.count += 1
        if self.what == "input":
            latents.mul_(2)
        result = self.site(latents)
        if self.what == "site output":
            result.mul_(3)
        if self.what == "view of the site output":
            result[:, 0].add_(1)
        if self.what == "intermediate":
            result = (result + 1).relu_()
        return result + self.count


@pytest.mark.parametrize("what", ["site output", "view of the site output", "intermediate"])
def test_writes_to_what_the_model_made_are_captured(what: str) -> None:
    torch.manual_seed(0)
    model, schedule = Writes(what).eval(), Schedule.every(3, steps=STEPS, sites=["site"])
    compiled, truth = hrt.compile(model, schedule, strict=True, debug=True), hrt.reference(model, schedule)
    for step in range(STEPS):
        assert torch.equal(compiled(**stack_call(step)), truth(**stack_call(step)))


@pytest.mark.parametrize(("what", "target"), [("buffer", "count"), ("input", "latents")])
def test_writes_to_buffers_and_inputs_fall_back_with_a_reason(what: str, target: str) -> None:
    torch.manual_seed(0)
    model, schedule = Writes(what).eval(), Schedule.every(3, steps=STEPS, sites=["site"])
    compiled = hrt.compile(model, schedule)
    with pytest.warns(hrt.FallbackWarning, match=f"it writes to {target}"):
        got = [compiled(**stack_call(step)) for step in range(STEPS)]
    assert model.count.item() == (STEPS if what == "buffer" else 0)  # tracing is no call
    model.count.zero_()
    truth = hrt.reference(model, schedule)
    assert same(got, [truth(**stack_call(step)) for step in range(STEPS)])
    with pytest.raises(hrt.CaptureError, match=f"it writes to {target}"):
        hrt.compile(model, schedule, strict=True)(**stack_call(0))


class Branching(Stack):
    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        latents = super().forward(latents, timestep)
        return latents if latents.sum().item() > -1e9 else -latents


def test_strict_raises_where_a_value_decides() -> None:
    model = Branching().eval()
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)), strict=True)
    with pytest.raises(hrt.CaptureError, match="cannot be traced into one graph"):
        compiled(**stack_call(0))


def test_hooks_inside_come_and_go() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=2, sites=hrt.find_sites(model))
    compiled, truth = hrt.compile(model, schedule), hrt.reference(model, schedule)

    def run() -> list[torch.Tensor]:
        compiled.reset()
        truth.reset()
        results = [compiled(**stack_call(step)) for step in range(2)]
        assert same(results, [truth(**stack_call(step)) for step in range(2)])
        return results

    before = run()
    handle = model.blocks[1].register_forward_hook(lambda m, a, output: output * 2)
    with pytest.warns(hrt.FallbackWarning, match=r"carry hooks.*blocks\.1"):
        hooked = run()
    handle.remove()
    assert not same(hooked, before)
    assert same(run(), before)
    assert compiled.report().fallbacks == ()


def test_training_mode_after_compiling_is_an_error() -> None:
    model = stack()
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)))
    compiled(**stack_call(0))
    model.train()
    compiled.reset()
    with pytest.raises(hrt.CaptureError, match="training mode"):
        compiled(**stack_call(0))
    model.eval()
    compiled.reset()
    assert torch.equal(compiled(**stack_call(0)), model(**stack_call(0)))


def test_a_layer_left_in_training_mode_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """It computes the same as long as nothing is drawn in it."""
    model = stack()
    model.blocks[0].drop = nn.Dropout(0.5).eval()
    model.blocks[0].register_module("attn", nn.Sequential(model.blocks[0].attn, model.blocks[0].drop))
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)), lowering="plain")
    compiled(**stack_call(0))
    model.blocks[1].train()
    compiled.reset()
    assert torch.equal(compiled(**stack_call(0)), model(**stack_call(0)))
    assert any("blocks.1.training changed from False to True" in line for line in caplog.messages)
    model.blocks[0].drop.train()
    compiled.reset()
    with pytest.raises(hrt.CaptureError, match=r"training mode: call model\.eval\(\) first \(at blocks\.0\."):
        compiled(**stack_call(0))


def test_sites_by_globs() -> None:
    model = stack()
    sites = hrt.find_sites(model, patterns=["blocks.*.mlp.2", "blocks.0.attn"])
    assert sites == ["blocks.0.attn", "blocks.0.mlp.2", "blocks.1.mlp.2", "blocks.2.mlp.2"]
    schedule = Schedule.every(2, steps=2, sites=sites)
    compiled, truth = hrt.compile(model, schedule, strict=True), hrt.reference(model, schedule)
    for step in range(2):
        assert torch.equal(compiled(**stack_call(step)), truth(**stack_call(step)))
