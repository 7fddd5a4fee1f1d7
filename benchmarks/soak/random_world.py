"""Draws random worlds and their schedules from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

import harmonica_rt as hrt
from benchmarks.soak.change import Change
from benchmarks.soak.samplers import evaluations
from benchmarks.soak.subject import PROMPT_FACTORS, Subject
from benchmarks.soak.subjects import SUBJECTS
from benchmarks.soak.world import Event, Request, Run, World

PROMPTS = len(PROMPT_FACTORS)
MAX_STATES = 3  # per run; a compiled model keeps the streams of about as many


def random_world(seed: int, *, runs: int, subject: str, interface: str = "compile", private: bool = False) -> World:
    """The world of a seed; equal for equal arguments.

    Args:
        seed: seed of everything.
        runs: number of runs.
        subject: name of the pipeline in `SUBJECTS`.
        interface: how it is compiled; see `World`.
        private: make no changes to classes or modules, which other models in the process would see.
    """
    draw = random.Random(seed)
    found = SUBJECTS[subject]
    sampler = draw.choice(list(found.samplers))
    variant = draw.randrange(12)
    if interface == "model":
        variant -= variant // 3 % 2 * 3  # one call per step, which a model compiled alone needs; see `loop_subject`
    world = World(
        seed=seed,
        subject=subject,
        interface=interface,
        lowering="plain" if interface == "reference" or draw.random() < 0.85 else "fused",
        sampler=sampler,
        inference_steps=draw.randint(3, 8),
        variant=variant,
    )
    names = sorted(name for name, change in found.changes.items() if not (private and change.shared))
    return replace(world, runs=tuple(_random_runs(draw, world, found, names, runs)))


def random_schedule(world: World) -> hrt.Schedule:
    """A schedule from the world's seed: every n-th step, or a random mask."""
    model = SUBJECTS[world.subject].build(world.seed, world.variant, world.sampler).transformer
    sites, steps = hrt.find_sites(model), evaluations(world.sampler, world.inference_steps)
    draw = np.random.default_rng(world.seed)
    if draw.random() < 0.3:
        return hrt.Schedule.every(int(draw.integers(2, 5)), steps=steps, sites=sites)
    mask = draw.random((steps, len(sites))) < draw.choice([0.2, 0.5, 0.8])
    mask[0] = True
    return hrt.Schedule.from_array(mask, sites=sites)


def _random_runs(draw: random.Random, world: World, subject: Subject, names: Sequence[str], count: int) -> list[Run]:
    steps = evaluations(world.sampler, world.inference_steps)
    few = draw.sample(names, min(len(names), draw.randint(1, 2)))
    shapes = draw.sample([(1, 0), (1, 0), (2, 0), (1, 1)], 2)
    late = subject.starts_late(world.sampler) and world.interface != "model"
    state: dict[str, int] = {}
    parameters, made = 0, []
    for _ in range(count):
        for name in few:
            if draw.random() < 0.1:
                state[name] = draw.randrange(subject.changes[name].values)
        if draw.random() < 0.1:
            parameters = draw.randrange(3)
        guided = subject.guidance and draw.random() < 0.5
        first = draw.randrange(1, steps) if late and draw.random() < 0.15 else 0
        batch, size = draw.choice(shapes)
        run = Run(
            request=Request(
                seed=draw.randrange(2**31),
                batch=batch,
                size=size,
                guided=guided,
                prompt=draw.randrange(PROMPTS),
                first=first,
            ),
            interrupted_at=int(10 ** draw.uniform(0, 3.5)) if draw.random() < 0.03 else 0,
            state=tuple(sorted((name, value) for name, value in state.items() if value)),
            parameters=parameters,
            before=tuple(kind for kind, share in subject.before.items() if draw.random() < share),
            events=_random_events(draw, subject, few, state, steps - first, guided=guided),
        )
        made.append(run)
    return made


def _random_events(
    draw: random.Random,
    subject: Subject,
    few: Sequence[str],
    state: Mapping[str, int],
    steps: int,
    *,
    guided: bool,
) -> tuple[Event, ...]:
    """Up to three events. Those that create streams are of one kind: a model keeps few streams."""
    if steps < 2 or draw.random() < 0.35:
        return ()
    events = []
    kind = draw.choice(["change", "change", *subject.events])
    times = sorted(draw.sample(range(steps - 1), min(steps - 1, draw.randint(1, 3))))
    if kind == "change":
        events += _random_changes(draw, subject.changes, few, state, times, two_calls=guided)
    elif kind == "prompt":
        pool = draw.sample(range(PROMPTS), 2)
        events += [Event(after, kind, value=draw.choice(pool)) for after in times]
    elif kind == "prompt in place":  # new values only: the package notices any write, the oracle only other values
        events += [Event(after, kind, value=value) for value, after in enumerate(times[: PROMPTS - 1], start=1)]
    else:
        events.append(Event(times[0], kind))
    for other in ("outside", "gradient", "collect", "raise"):
        if other in subject.events and draw.random() < 0.05:
            events.append(Event(draw.choice(times), other))
    return tuple(events)


def _random_changes(
    draw: random.Random,
    changes: Mapping[str, Change],
    few: Sequence[str],
    state: Mapping[str, int],
    times: Sequence[int],
    *,
    two_calls: bool,
) -> list[Event]:
    """One change that goes back and forth. Two calls per step have twice the streams, and so get half the states."""
    name = draw.choice(list(few))
    now = state.get(name, 0)
    others = [value for value in range(changes[name].values) if value != now]
    pool = [now, *draw.sample(others, min(len(others), 1 if two_calls else MAX_STATES - 1))]
    events = []
    for after in times:
        now = draw.choice([value for value in pool if value != now])
        events.append(Event(after, "change", name, now))
    return events
