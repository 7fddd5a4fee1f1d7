"""A watched scheduler looks as it did, and its copies are plain."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch

from harmonica_rt.sampling.scheduler import listener_of, unwatch, watch


class Listener:
    """Writes down what it is told."""

    undone_by = "nothing"

    def __init__(self) -> None:
        self.told: list[str] = []

    def run_begins(self, scheduler: Any) -> None:
        self.told.append("run")

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        self.told.append("step")

    def step_ends(self, scheduler: Any) -> None:
        self.told.append("end")


SCHEDULERS: list[Callable[[], Any]] = [
    d.DDIMScheduler,
    d.FlowMatchEulerDiscreteScheduler,
    d.DPMSolverMultistepScheduler,
    d.HeunDiscreteScheduler,
    d.UniPCMultistepScheduler,
]


def stepped(scheduler: Any) -> Any:
    """In its second step, so that it has a state."""
    scheduler.set_timesteps(4)
    scheduler.step(torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2))
    return scheduler


@pytest.fixture(params=SCHEDULERS, ids=lambda cls: cls.__name__)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Listener]:
    """A plain scheduler, and one of the same class that is watched by a listener."""
    plain, watched, listener = request.param(), request.param(), Listener()
    watch(watched, listener)
    return stepped(plain), stepped(watched), listener


def test_nothing_shows(pair: tuple[Any, Any, Listener], tmp_path: Path) -> None:
    plain, watched, listener = pair
    assert listener.told == ["run", "step", "end"]
    assert vars(watched).keys() == vars(plain).keys()
    assert copy.deepcopy(vars(watched)).keys() == vars(plain).keys()
    assert repr(watched) == repr(plain)
    assert watched.to_json_string() == plain.to_json_string()
    assert watched.config == plain.config
    assert watched.__class__ is type(plain)
    for scheduler in (plain, watched):
        scheduler.save_pretrained(tmp_path / str(scheduler is plain))
    saved = [next((tmp_path / str(which)).iterdir()).read_text() for which in (True, False)]
    assert saved[0] == saved[1]


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
    "the oldest pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler, protocol=0)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_plain_and_go_on_where_it_was(pair: tuple[Any, Any, Listener], how: str) -> None:
    plain, watched, listener = pair
    made = COPIES[how](watched)
    assert type(made) is type(plain)
    assert listener_of(made) is None
    before = list(listener.told)
    call = torch.full((1, 1, 2, 2), 0.5), plain.timesteps[1], torch.ones(1, 1, 2, 2)
    assert torch.equal(made.step(*call).prev_sample, plain.step(*call).prev_sample)
    assert listener.told == before


def test_schedulers_made_from_it_have_no_listener(pair: tuple[Any, Any, Listener]) -> None:
    plain, watched, listener = pair
    assert type(watched.__class__.from_config(watched.config)) is type(plain)
    same_class = type(watched).from_config(watched.config)
    before = list(listener.told)
    stepped(same_class)
    assert listener.told == before
    watch(same_class, Listener())
    assert listener_of(watched) is listener
    for scheduler in (same_class, watched):
        unwatch(scheduler)
        assert type(scheduler) is type(plain)


def test_equality_and_state_of_its_own() -> None:
    @dataclass
    class Dated:
        steps: int = 0

        def set_timesteps(self, steps: int) -> None:
            self.steps = steps

        def step(self, noise: Any, timestep: Any, sample: Any) -> Any:
            return sample

        def __getstate__(self) -> Any:
            return {"steps": self.steps + 1}

    scheduler = Dated()
    watch(scheduler, Listener())
    scheduler.set_timesteps(3)
    assert scheduler == Dated(3)
    assert copy.copy(scheduler) == Dated(4)


def test_the_listener_goes_with_its_scheduler() -> None:
    scheduler, listener = d.DDIMScheduler(), Listener()
    gone = weakref.ref(listener)
    watch(scheduler, listener)
    del listener
    gc.collect()
    assert gone() is not None
    scheduler.set_timesteps(2)
    del scheduler
    gc.collect()
    assert gone() is None
