"""What a forward takes for granted may change between two steps of a run: seen at the next call, and when it is undone.

Held against a truth with hooks that is told of the changes, and shares nothing with the package.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import logging
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harmonica_rt as hrt
from harmonica_rt import FallbackWarning, Schedule
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.model.watch import ModelWatch
from tests.models import stack_call
from tests.sampling import loops
from tests.sampling.loops import Pipeline, conditioned

STEPS = 7
CHANGED, UNDONE = 3, 5  # steps before which the model is changed, and changed back
STRENGTH = {"of": 1.0}  # read by a function by name


def strengthened(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return x * STRENGTH["of"] * by


def closing_over(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * value

    return scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Processor:
    factor = 1.0

    def __init__(self, scale: float = 1.0) -> None:
        self.settings = {"scales": {"image": [scale]}}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.settings["scales"]["image"][0] * self.factor


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Attention(nn.Module):
    """Reads something of every kind: attributes, objects, containers, functions, tensors."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.table = torch.ones(8)
        self.scale = 1.0
        self.configs = [Config()]
        self.slotted = Slotted()
        self.processor = Processor()
        self.array = np.ones(1)
        self.names = {"on"}
        self.queue = collections.deque([1.0])
        self.scaled = closing_over(1.0)
        self.partial = functools.partial(strengthened, by=1.0)

    @property
    def offset(self) -> float:
        return 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.project(x)) * self.table * self.scale + self.mean + self.offset + self.shift
        x = x * self.configs[0].scale * self.slotted.scale * float(self.array[0]) * self.queue[0]
        return self.partial(self.scaled(strengthened(self.processor(x)))) * (1.0 if "on" in self.names else 2.0)


class Doubled(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """A plain block, and one that reads something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.blocks = nn.ModuleList([Block(nn.Linear(8, 8)), Block(Attention())])

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        latents = latents + self.embed(timestep[:, None])[:, None]
        for block in self.blocks:
            latents = block(latents)
        return latents


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


Change = Callable[[Model], Callable[[], None]]  # changes a model; what it returns undoes that


def setting(owner: Callable[[Model], Any], name: str, value: Any) -> Change:
    def change(model: Model) -> Callable[[], None]:
        target = owner(model)
        slot = isinstance(getattr(type(target), name, None), types.MemberDescriptorType)
        own = slot or name in getattr(target, "__dict__", ()) or not hasattr(type(target), name)
        before = getattr(target, name)
        setattr(target, name, value(before) if callable(value) else value)
        return lambda: setattr(target, name, before) if own else delattr(target, name)

    return change


def entry(owner: Callable[[Model], Any], key: Any, value: Any) -> Change:
    def change(model: Model) -> Callable[[], None]:
        target = owner(model)
        before = target[key]
        target[key] = value
        return lambda: target.__setitem__(key, before)

    return change


def _nothing(model: Model) -> Callable[[], None]:
    return lambda: None


def attention(model: Model) -> Attention:
    found = model.blocks[1].attn
    assert isinstance(found, Attention)
    return found


def _twice(before: Any) -> Any:
    return lambda *args, **kwargs: 2 * before(*args, **kwargs)


def _closure(model: Model) -> Callable[[], None]:
    (cell,) = attention(model).scaled.__closure__
    cell.cell_contents = 2.0
    return lambda: setattr(cell, "cell_contents", 1.0)


def _defaults(model: Model) -> Callable[[], None]:
    strengthened.__defaults__ = (2.0,)
    return lambda: setattr(strengthened, "__defaults__", (1.0,))


def _code(model: Model) -> Callable[[], None]:
    function = Processor.__call__
    before = function.__code__
    function.__code__ = (lambda self, x: 2 * x).__code__
    return lambda: setattr(function, "__code__", before)


def _class(model: Model) -> Callable[[], None]:
    attention(model).__class__ = Doubled
    return lambda: setattr(attention(model), "__class__", Attention)


def _names(model: Model) -> Callable[[], None]:
    attention(model).names.clear()
    return lambda: attention(model).names.add("on")


def _in_place(model: Model) -> Callable[[], None]:
    weight = attention(model).project.weight
    before = weight.clone()
    weight.mul_(2)
    return lambda: weight.copy_(before)


def _module(model: Model) -> Callable[[], None]:
    block, before = model.blocks[1], model.blocks[1].attn
    torch.manual_seed(5)
    block.attn = Attention().eval().requires_grad_(False)
    return lambda: setattr(block, "attn", before)


def _parameter(model: Model) -> Callable[[], None]:
    project, before = attention(model).project, attention(model).project.weight
    project.weight = nn.Parameter(before * 2, requires_grad=False)
    return lambda: setattr(project, "weight", before)


def _hook(model: Model) -> Callable[[], None]:
    return attention(model).project.register_forward_hook(lambda module, args, output: 2 * output).remove


def _hook_on_every_module(model: Model) -> Callable[[], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if module is attention(model).project else None

    return nn.modules.module.register_module_forward_hook(hook).remove


CHANGES: dict[str, Change] = {
    "attribute": setting(attention, "scale", 2.0),
    "object in a list": setting(lambda m: attention(m).configs[0], "scale", 2.0),
    "object with slots": setting(lambda m: attention(m).slotted, "scale", 2.0),
    "list in a dict in a dict in an object": entry(
        lambda m: attention(m).processor.settings["scales"]["image"], 0, 2.0
    ),
    "processor": setting(attention, "processor", lambda before: Processor(2.0)),
    "class attribute of an object": setting(lambda m: Processor, "factor", 2.0),
    "class attribute of a module": setting(lambda m: Attention, "shift", 1.0),
    "array": entry(lambda m: attention(m).array, 0, 2.0),
    "set": _names,
    "deque": entry(lambda m: attention(m).queue, 0, 2.0),
    "closure": _closure,
    "partial": setting(attention, "partial", lambda before: functools.partial(strengthened, by=2.0)),
    "default of a function": _defaults,
    "code of a method": _code,
    "plain tensor": setting(attention, "table", lambda before: before * 2),
    "property": setting(lambda m: Attention, "offset", property(lambda self: 1.0)),
    "forward of the model's class": setting(lambda m: Model, "forward", _twice),
    "forward of an inner class": setting(lambda m: Attention, "forward", _twice),
    "forward of a class of torch": setting(lambda m: nn.Linear, "forward", _twice),
    "forward of an instance": setting(attention, "forward", _twice),
    "forward of the model itself": setting(lambda m: m, "forward", _twice),
    "class of a module": _class,
    "function by name": setting(lambda m: sys.modules[__name__], "strengthened", _twice),
    "value that a function reads": entry(lambda m: STRENGTH, "of", 2.0),
    "function of torch": setting(lambda m: F, "gelu", _twice),
    "module": _module,
    "parameter": _parameter,
    "parameter, in place": _in_place,
    "buffer": setting(attention, "mean", lambda before: before + 1),
    "hook": _hook,
    "hook on every module": _hook_on_every_module,
}
EAGER = {"hook", "hook on every module"}  # no graph stands for a model with hooks


@contextmanager
def reusing(model: nn.Module, schedule: Schedule, held: dict[str, Any], step: int) -> Iterator[None]:
    """Within this block a forward of the model reuses what `held` has for the step, if it has everything."""
    reused = {
        site: schedule.compute[:step, i] for i, site in enumerate(schedule.sites) if not schedule.compute[step, i]
    }
    if any(site not in held or held[site][0] < np.flatnonzero(rows)[-1] for site, rows in reused.items()):
        reused = {}

    def hook(site: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if site not in reused:
            held[site] = (step, output.clone())
        return held[site][1]

    handles = [
        model.get_submodule(site).register_forward_hook(functools.partial(hook, site)) for site in schedule.sites
    ]
    yield
    for handle in handles:
        handle.remove()


def changing(model: Model, change: Change) -> Iterator[tuple[int, str]]:
    """The steps, each with a name for what the model is in it."""
    undo = None
    for step in range(STEPS):
        if step == CHANGED:
            undo = change(model)
        if step == UNDONE and undo is not None:
            undo()
        yield step, "changed" if CHANGED <= step < UNDONE else "as it was"


def truth(
    model: Model, schedule: Schedule, change: Change | None = None, *, comes_back: bool = True
) -> list[torch.Tensor]:
    features: dict[str, dict[str, Any]] = {}
    outputs = []
    for step, state in changing(model, change or _nothing):
        name = state if comes_back or step < UNDONE else "another"
        name = name if change is not None else "as it was"
        with reusing(model, schedule, features.setdefault(name, {}), step), torch.no_grad():
            outputs.append(model(**stack_call(step)))
    return outputs


def schedule_of(model: nn.Module) -> Schedule:
    sites = hrt.find_sites(model, patterns=["blocks.*.attn", "blocks.*.mlp"])
    mask = np.random.default_rng(1).random((STEPS, len(sites))) < 0.5
    mask[0] = True
    return Schedule.from_array(mask, sites=sites)


@pytest.mark.parametrize("door", ["compiled", "reference"])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.filterwarnings("ignore::harmonica_rt.FallbackWarning")
def test_changes_within_a_run(kind: str, door: str) -> None:
    tried, change = model(), CHANGES[kind]
    schedule = schedule_of(tried)
    # what is written in place does not come back: the values are equal again, but nothing shows that
    expected = truth(tried, schedule, change, comes_back=kind != "parameter, in place")
    assert not torch.equal(expected[CHANGED], truth(tried, schedule)[CHANGED])
    compiled = hrt.compile(tried, schedule, lowering="plain") if door == "compiled" else hrt.reference(tried, schedule)
    for turn in ("first", "again"):
        compiled.reset()
        got = [compiled(**stack_call(step)) for step, _ in changing(tried, change)]
        same = [bool(torch.equal(a, b)) for a, b in zip(got, expected, strict=True)]
        assert all(same), (turn, same)
        if turn == "first" and isinstance(compiled, hrt.CompiledModel):
            plans = 1 if kind in EAGER | {"parameter", "parameter, in place", "buffer"} else 2
            assert len(compiled.report().plans) == plans, "changing back must find the plan that there was"


@pytest.mark.parametrize("kind", ["attribute", "forward of the model's class", "function by name", "parameter"])
def test_fused_and_hoisted_values_follow(kind: str) -> None:
    tried, change = model(), CHANGES[kind]
    schedule = schedule_of(tried)
    expected = truth(tried, schedule, change)
    compiled = hrt.compile(tried, schedule, strict=True)
    for _ in range(2):
        compiled.reset(timesteps=range(STEPS))
        for (step, _), each in zip(changing(tried, change), expected, strict=True):
            torch.testing.assert_close(compiled(**stack_call(step)), each)


def test_a_change_in_every_step_is_said_once_and_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    tried = model()
    schedule = schedule_of(tried)
    compiled = hrt.compile(tried, schedule, lowering="plain")
    with caplog.at_level(logging.WARNING):
        for step in range(STEPS):
            attention(tried).scale = 1.0 + step
            got = compiled(**stack_call(step))
            with torch.no_grad():
                assert torch.equal(got, tried(**stack_call(step)))
    assert sum("changed more than" in line for line in caplog.messages) == 1
    assert any("blocks.1.attn.scale changed from" in line for line in caplog.messages)
    assert len(compiled.report().plans) < STEPS


def test_nothing_is_looked_at_twice_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = model()
    compiled = hrt.compile(tried, schedule_of(tried), lowering="plain", strict=True)
    for _ in range(2):
        compiled.reset()
        for step in range(STEPS):
            compiled(**stack_call(step))
        monkeypatch.setattr(ModelWatch, "_inspect", lambda self: pytest.fail("the model was inspected anew"))


NO_CHANGES: dict[str, Callable[[Model], object]] = {
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.dumps(attention(m).processor),
    "weights read": lambda m: m.state_dict(),
    "set to what it is": lambda m: m.eval().to(torch.float32).requires_grad_(True),
    "an attribute set to an equal number": lambda m: setattr(attention(m), "scale", float(str(attention(m).scale))),
    "garbage collected": lambda m: gc.collect(),
}


@pytest.mark.parametrize("kind", NO_CHANGES)
def test_what_changes_nothing_makes_no_plan_and_no_step_in_full(kind: str) -> None:
    tried = model()
    compiled = hrt.compile(tried, schedule_of(tried), lowering="plain", strict=True)
    compiled.reset()
    for step in range(STEPS):
        if step in (CHANGED, UNDONE):
            NO_CHANGES[kind](tried)
        compiled(**stack_call(step))
    assert len(compiled.report().plans) == 1
    assert compiled.report().last_catch_ups == ()


@pytest.fixture
def late_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines look at the model after a step has started, as on a GPU."""
    monkeypatch.setattr(PlannedEngine, "looks_late", property(lambda self: not self._ran_eagerly))


@pytest.mark.parametrize("kind", ["attribute", "processor", "parameter", "function by name", "hook"])
@pytest.mark.filterwarnings("ignore::harmonica_rt.FallbackWarning")
@pytest.mark.usefixtures("late_looks")
def test_a_step_that_began_before_the_look_is_done_again(kind: str) -> None:
    tried, change = model(), CHANGES[kind]
    schedule = schedule_of(tried)
    # the step that was begun in vain spoils the features that the state had, so it starts anew when it comes back
    expected = truth(tried, schedule, change, comes_back=False)
    compiled = hrt.compile(tried, schedule, lowering="plain")
    for _ in range(2):
        compiled.reset()
        got = [compiled(**stack_call(step)) for step, _ in changing(tried, change)]
        assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * STEPS
    assert compiled.stats is not None
    assert compiled.stats.calls == STEPS


@pytest.mark.parametrize("kind", ["attribute", "processor", "parameter", "function by name", "hook"])
@pytest.mark.filterwarnings("ignore::harmonica_rt.FallbackWarning")
@pytest.mark.usefixtures("late_looks")
def test_a_run_that_began_before_the_look_begins_anew(kind: str) -> None:
    tried, change = model(), CHANGES[kind]
    schedule = schedule_of(tried)
    compiled, reference = hrt.compile(tried, schedule, lowering="plain"), hrt.reference(tried, schedule)

    def agree() -> None:
        compiled.reset(), reference.reset()
        for step in range(STEPS):
            assert torch.equal(compiled(**stack_call(step)), reference(**stack_call(step)))
        assert compiled.stats is not None
        assert (compiled.stats.calls, compiled.stats.catch_ups) == (STEPS, [])
        for runtime in compiled.plans.values():  # no second arena for the step that was begun in vain
            assert runtime.arenas.slot_bytes == sum(runtime.lowered.plan.table.arena_bytes.values())

    for _ in range(2):
        agree()
        undo = change(tried)
        agree()
        agree()
        undo()


@pytest.mark.usefixtures("late_looks")
def test_a_model_that_changes_before_each_run_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = model()
    compiled = hrt.compile(tried, schedule_of(tried), lowering="plain", strict=True)
    begun: list[bool] = []
    begin_run = PlannedEngine.begin_run

    def noted(self: PlannedEngine, key: Any = None, schedule: Any = None) -> Any:
        known = begin_run(self, key, schedule)
        begun.append(known is not None)
        return known

    monkeypatch.setattr(PlannedEngine, "begin_run", noted)
    for _ in range(3):
        with torch.no_grad():
            next(tried.parameters()).mul_(0.9)
        compiled.reset()
        for step in range(STEPS):
            compiled(**stack_call(step))
    assert begun == [False, True, False, False]  # the second run begins twice, the third looks first
    for _ in range(2):
        compiled.reset()
        compiled(**stack_call(0))
    assert begun[4:] == [False, True]


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_verify_does_not_share_the_fault(monkeypatch: pytest.MonkeyPatch, lowering: str) -> None:
    pipeline = Pipeline(conditioned())
    activation = pipeline.transformer.blocks[0].mlp[1]

    def change_the_activation(pipeline: Pipeline, step: int) -> None:
        activation.approximate = "tanh" if step in (1, 2) else "none"

    sites = hrt.find_sites(pipeline.transformer)
    schedule = Schedule.every(2, steps=loops.STEPS, sites=sites)  # step 2 computes all sites
    assert hrt.verify(pipeline, schedule, lowering=lowering, on_step=change_the_activation).ok

    look = ModelWatch.look
    seen: dict[int, Any] = {}
    monkeypatch.setattr(ModelWatch, "look", lambda self: seen.setdefault(id(self), look(self)))
    monkeypatch.setattr(ModelWatch, "accept", lambda self: None)
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(pipeline, schedule, lowering=lowering, on_step=change_the_activation)
    assert error.value.step == 2


class Writes(Model):
    """Writes state of some kind whenever it runs."""

    calls = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.own = 0
        self.store: dict[str, Any] = {"maps": {}}
        self.log: list[Any] = []
        self.table: torch.Tensor | None = None
        self.shape: tuple[int, ...] | None = None

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.kind == "counter":
            self.own += 1
            latents = latents * self.own
        if self.kind == "counter of the class":
            type(self).calls += 1
        if self.kind == "counter by name":
            STRENGTH["calls"] = STRENGTH.get("calls", 0) + 1
        if self.kind == "store":
            self.store["maps"]["last"] = latents
        if self.kind == "log":
            self.log.append(latents)
        if self.kind == "table":
            if self.table is None:
                self.table = torch.ones(8)
            latents = latents * self.table
            self.shape = tuple(latents.shape)
        return super().forward(latents, timestep)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("counter", r"own changed from 1 to 2|own changed from 0 to 1"),
        ("counter of the class", r"Writes\.calls changed"),
        ("counter by name", r"STRENGTH.*calls|STRENGTH changed"),
        ("store", r"store\['maps'\]"),
        ("log", r"log changed|log\[0\] was added"),
    ],
)
def test_a_forward_that_writes_state_has_no_static_plan(kind: str, named: str) -> None:
    torch.manual_seed(0)
    tried = Writes(kind).eval().requires_grad_(False)
    schedule = schedule_of(tried)
    before = dict(STRENGTH), Writes.calls
    with pytest.raises(hrt.CaptureError, match=named) as error:
        hrt.compile(tried, schedule, strict=True)(**stack_call(0))
    assert "carries state from one call to the next" in str(error.value)
    assert (tried.own, tried.store, tried.log, dict(STRENGTH), Writes.calls) == (0, {"maps": {}}, [], *before)

    expected = truth(tried, schedule)
    tried.own = 0
    compiled = hrt.compile(tried, schedule)
    with pytest.warns(FallbackWarning, match=named):
        got = [compiled(**stack_call(step)) for step in range(STEPS)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    STRENGTH.pop("calls", None)


def test_a_table_made_at_the_first_call_is_no_state() -> None:
    tried = Writes("table").eval().requires_grad_(False)
    schedule = schedule_of(tried)
    compiled = hrt.compile(tried, schedule, strict=True, lowering="plain")
    got = [compiled(**stack_call(step)) for step in range(STEPS)]
    expected = truth(tried, schedule)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert compiled.report().last_catch_ups == ()
    assert len(compiled.report().plans) == 1


@pytest.mark.parametrize("door", ["compiled", "reference"])
def test_a_site_that_was_removed_is_named(door: str) -> None:
    tried = model()
    schedule = schedule_of(tried)
    compiled = hrt.compile(tried, schedule) if door == "compiled" else hrt.reference(tried, schedule)
    compiled.reset()
    compiled(**stack_call(0))
    del tried.blocks[1]
    with pytest.raises(hrt.HarmonicaError, match=r"Model has no module blocks\.1\.attn"):
        compiled(**stack_call(1))
