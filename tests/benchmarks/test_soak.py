"""Random runs through real pipelines against the oracle of hooks, some of every kind; and the soak's own parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from torch import nn

from benchmarks.soak import toy
from benchmarks.soak.drive import KINDS, PIECE, Kind, Tally, added_up, faults_of, pieces
from benchmarks.soak.oracle import Counts, Oracle
from benchmarks.soak.outcome import Outcome
from benchmarks.soak.pair import Pair
from benchmarks.soak.random_world import random_schedule, random_world
from benchmarks.soak.shrink import shrunk
from benchmarks.soak.side import Side
from benchmarks.soak.subjects import SUBJECTS
from benchmarks.soak.world import Event, Request, Run, World
from harmonica_rt import Schedule
from tests.tiers import member

pytestmark = [
    # KDPM2 hands tensors to numpy functions, which call their __array_wrap__ in a way that is going away
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::harmonica_rt.FallbackWarning"),  # hooks inside the model
    # said of a second adapter
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


# ---- every change, in mid-run and between runs


def there_and_back(name: str) -> tuple[Run, ...]:
    """A run that is changed after step 0 and back after step 2, then one that begins with the change."""
    events = (Event(0, "change", name, 1), Event(2, "change", name, 0))
    return Run(Request(seed=1), events=events), Run(Request(seed=2), state=((name, 1),))


def faults(world: World) -> list[str]:
    """What is wrong, run by run."""
    pair = Pair(world)
    try:
        found = [pair.fault(run) for run in world.runs]
    finally:
        pair.close()
    return [f"run {index}: {what}" for index, what in enumerate(found) if what is not None]


def world_of(subject: str, change: str, interface: str = "compile") -> World:
    sampler = SUBJECTS[subject].samplers[0]
    return World(
        seed=4,
        subject=subject,
        interface=interface,
        sampler=sampler,
        inference_steps=5,
        variant=3,
        runs=there_and_back(change),
    )


def test_the_steps_after_a_change_reuse_some_sites() -> None:
    """Else what follows would not tell whether a stream goes on."""
    compute = random_schedule(world_of("loop", "attribute")).compute
    assert all(0 < compute[step].sum() < compute.shape[1] for step in (1, 3))


OF_DIFFUSERS = [
    ("dit", "forward of the model's class"),
    ("pixart", "processor"),
    ("sd3", "site replaced"),
    ("flux", "global function"),
    # tests/pipelines_in_use has these changes too
    pytest.param("sd3, LoRA", "adapters", marks=pytest.mark.exhaustive),
    pytest.param("flux, image prompt", "image scale", marks=pytest.mark.exhaustive),
]


# one for each place that state can be in; the rest lie deeper in the same places
SOME = (
    "attribute",
    "object in an object",
    "tensor in a dict",
    "processor",
    "closure",
    "site replaced",
    "forward of the model",
    "hook",
    "class attribute",
    "global function",
    "default of a function",
)
# of these, tests/model/test_changes.py has the like
ELSEWHERE = (
    "dict in a dict",
    "list in a dict",
    "dict in a list in an object",
    "plain tensor",
    "buffer",
    "state of a processor",
    "closed-over value",
    "module in a site replaced",
    "forward of a site",
    "forward of a site's class",
    "forward of the model's class",
    "method of a class",
    "global number",
    "function of a function",
)
TRACED = ("attribute", "tensor in a dict", "closure", "hook", "default of a function")  # dynamo guards each differently


def some(always: Callable[[str], bool]) -> list[Any]:
    """Every change of the small pipeline; `make test` runs those that are `always`."""
    return [member(change, id=change, always=always(change)) for change in SUBJECTS["loop"].changes]


@pytest.mark.parametrize("change", some(lambda change: change not in ELSEWHERE))
def test_a_change_is_seen_at_the_next_call(change: str) -> None:
    assert faults(world_of("loop", change)) == []


@pytest.mark.parametrize("change", some(lambda change: change in SOME))
def test_a_change_is_seen_by_the_reference(change: str) -> None:
    assert faults(world_of("loop", change, "reference")) == []


@pytest.mark.parametrize(("subject", "change"), OF_DIFFUSERS)
def test_a_change_is_seen_in_a_pipeline_of_diffusers(subject: str, change: str) -> None:
    assert faults(world_of(subject, change)) == []


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("change", some(lambda change: change in TRACED))
def test_a_change_is_seen_behind_torch_compile(change: str) -> None:
    assert faults(world_of("loop", change, "torch.compile")) == []


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_dynamo")
def test_an_adapter_is_seen_behind_torch_compile() -> None:
    assert faults(world_of("sd3, LoRA", "adapters", "torch.compile")) == []


# ---- random runs


OFTEN = ("loop", "sd3, from an image")  # all doors and all ways to share a denoiser, and one pipeline of diffusers


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "kind",
    [member(kind, id=kind.name, always=kind.subject in OFTEN) for kind in KINDS],
)
def test_random_runs(kind: Kind) -> None:
    tally, most = Tally(), 6 if kind.subject == "loop" and kind.interface != "torch.compile" else 3
    assert [str(fault) for fault in faults_of(kind, 1, tally, most)] == []
    assert tally.runs >= most


# ---- the soak itself


def test_pieces_are_all_runs_once_each_with_worlds_of_its_own() -> None:
    found = pieces(10_000, 0)
    assert {kind.name: round(kind.share * 10_000) for kind in KINDS} == {
        name: tally.runs for name, tally in added_up((piece, Tally(runs=piece.runs)) for piece in found).items()
    }
    assert max(piece.runs for piece in found) <= PIECE
    assert len({piece.seed for piece in found} | {piece.seed for piece in pieces(10_000, 1)}) == 2 * len(found)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_change_makes_a_difference_and_can_be_undone(subject: str) -> None:
    side = Side(World(seed=1, subject=subject, sampler=SUBJECTS[subject].samplers[0]))
    before = side.call_from_outside(0, with_gradient=False)[0]
    for name, change in side.subject.changes.items():
        seen = [before]
        for value in range(1, change.values):
            side.set(name, value)
            seen.append(side.call_from_outside(0, with_gradient=False)[0])
        side.set(name, 0)
        assert torch.equal(side.call_from_outside(0, with_gradient=False)[0], before), name
        assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), name


def test_a_seed_gives_the_same_world() -> None:
    assert random_world(5, runs=9, subject="loop") == random_world(5, runs=9, subject="loop")
    assert random_world(5, runs=9, subject="loop") != random_world(6, runs=9, subject="loop")


class Doubling(nn.Module):
    """A site whose output tells which call made it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class OneSite(nn.Module):
    """Returns what its site does."""

    def __init__(self) -> None:
        super().__init__()
        self.site = Doubling()

    def forward(self, hidden_states: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.site(hidden_states)
        return result


@pytest.fixture
def calls() -> Iterator[tuple[Oracle, list[str], Callable[..., list[float]]]]:
    """An oracle whose schedule computes steps 0 and 3, the state it is told, and what calls in a step give."""
    schedule = Schedule.from_array(np.array([[True], [False], [False], [True], [False]]), sites=["site"])
    state, model = ["as built"], OneSite()
    oracle = Oracle(schedule, lambda: state[0])

    def step(*given: tuple[float, float]) -> list[float]:
        found = [float(model(hidden_states=torch.tensor([x]), prompt=torch.tensor([prompt]))) for x, prompt in given]
        oracle.advance()
        return found

    with oracle.watching(model):
        yield oracle, state, step


def test_the_oracle_reuses_what_the_schedule_says(calls: Any) -> None:
    oracle, _, step = calls
    assert [step((x, 0.0)) for x in (1.0, 2.0, 3.0, 4.0, 5.0)] == [[2.0], [2.0], [2.0], [8.0], [8.0]]
    assert oracle.counts == (5, 3, ())


def test_the_oracle_keeps_streams_apart(calls: Any) -> None:
    oracle, state, step = calls
    assert step((1.0, 0.0), (10.0, 7.0)) == [2.0, 20.0]
    assert step((2.0, 7.0), (3.0, 0.0)) == [20.0, 2.0]  # by their conditioning, not by their order
    state[0] = "changed"
    assert step((4.0, 0.0)) == [8.0]  # in full
    state[0] = "as built"
    assert step((5.0, 0.0)) == [10.0]
    state[0] = "changed"
    assert step((6.0, 0.0)) == [12.0]  # what this state stored is older than the schedule wants
    assert oracle.counts.in_full == (2, 4)


def test_the_oracle_tells_equal_calls_of_a_step_by_their_order(calls: Any) -> None:
    _, _, step = calls
    assert step((1.0, 0.0), (10.0, 0.0)) == [2.0, 20.0]
    assert step((2.0, 0.0), (3.0, 0.0)) == [2.0, 20.0]


def test_the_oracle_steps_aside(calls: Any) -> None:
    oracle, _, step = calls
    step((1.0, 0.0))
    with oracle.aside():
        model_alone = step((2.0, 0.0))
    assert model_alone == [4.0]
    assert oracle.counts.calls == 1


def test_faults_are_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled side that ignores one change: the last run alone, with that change alone, is left."""
    ignored = replace(SUBJECTS["loop"].changes["attribute"], set=lambda pipeline, value: None)
    original = Pair.__init__

    def deaf(self: Pair, world: World) -> None:
        original(self, world)
        subject = copy.copy(self.compiled.subject)
        self.compiled.subject = replace(subject, changes={**subject.changes, "attribute": ignored})

    monkeypatch.setattr(Pair, "__init__", deaf)
    noise = (Event(0, "collect"), Event(1, "prompt", value=1))
    runs = (Run(Request(seed=1)), Run(Request(seed=2, guided=True), state=(("attribute", 1), ("eps", 1)), events=noise))
    world = World(seed=1, subject="loop", inference_steps=3, interface="reference", runs=runs)
    tally, kind = Tally(), Kind("some", "loop", 1.0)
    monkeypatch.setattr("benchmarks.soak.drive.random_world", lambda *args, **kwargs: world)
    [fault] = faults_of(kind, 1, tally)
    assert fault.run == 1
    assert fault.what.startswith("wrong image: after step 0")
    assert tally.runs == 2
    assert shrunk(fault).runs == (Run(Request(seed=2), state=(("attribute", 1),)),)
    [first, *rest] = Tally(2, [fault]).rows("some")
    assert (first.metric, first.value) == ("runs", 2)
    assert [row.value for row in rest] == [1, 0, 0, 0, 0, 0]


def test_other_entries_reused_are_a_fault() -> None:
    pair = Pair(World(seed=1, subject="loop", inference_steps=3))
    image = torch.ones(1)
    expected, got = (Outcome(result=image, counts=counts) for counts in (Counts(3, 4, ()), Counts(3, 2, ())))
    assert pair.difference(expected, expected, Run(Request(seed=1))) is None
    assert pair.difference(expected, got, Run(Request(seed=1))) == (
        "other entries reused: Counts(calls=3, reused=2, in_full=()) instead of Counts(calls=3, reused=4, in_full=())"
    )


def test_the_toy_is_a_model_that_the_package_takes() -> None:
    assert Pair(World(seed=1, subject="loop", inference_steps=4)).fault(Run(Request(seed=1))) is None
    assert toy.Toy.damping == 0.5
