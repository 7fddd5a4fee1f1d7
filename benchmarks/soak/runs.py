"""Random worlds and runs as data: made from a seed, printed as they are, cut down by `shrink`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.soak.changes import Change
from benchmarks.soak.subjects import SUBJECTS, Subject, evaluations

PROMPTS = 3  # values of a prompt that a run may change between
MAX_STATES = 3  # of one run; a compiled model keeps the streams of about as many


@dataclass(frozen=True)
class Event:
    """Something that happens after a step of a run.

    Attributes:
        after: the step, counted from the first one that runs.
        kind: "change", "prompt", "prompt in place", "guidance", "raise", "stop", "outside", "gradient" or "collect".
        name: of the change.
        value: of the change, the prompt or the guidance.
    """

    after: int
    kind: str
    name: str = ""
    value: int = 0


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seed: of latents and noise.
        batch, size: number of images and their size, in units of the subject.
        guided: whether there is guidance at its beginning.
        prompt: which one it begins with.
        first: the step that it begins with.
        interrupted_at: the line of the package, counted as they run, at which Ctrl-C comes; 0 for never.
        state: the changes that are in force at its beginning, with their values.
        weights: which values the parameters have.
        before: what happens right before it.
        events: what happens in its midst.
    """

    seed: int
    batch: int = 1
    size: int = 0
    guided: bool = False
    prompt: int = 0
    first: int = 0
    interrupted_at: int = 0
    state: tuple[tuple[str, int], ...] = ()
    weights: int = 0
    before: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class World:
    """A pipeline that is compiled once, and its runs in order.

    Attributes:
        seed: of its weights and its schedule.
        subject: which pipeline.
        door: how it is compiled: the pipeline, its model by itself, with the reference engine, or by torch.compile.
        lowering: see `harmonica_rt.compile`.
        sampler: name of its scheduler.
        asked: number of inference steps.
        variant: picks among the ways to write the subject's loop.
        runs: in order.
    """

    seed: int
    subject: str
    door: str = "compile"
    lowering: str = "plain"
    sampler: str = "DDIM"
    asked: int = 6
    variant: int = 0
    runs: tuple[Run, ...] = ()


def random_world(seed: int, *, runs: int, subject: str, door: str = "compile", private: bool = False) -> World:
    """The world of a seed; equal for equal arguments.

    Args:
        seed: of everything.
        runs: how many it has.
        subject: which pipeline.
        door: how it is compiled.
        private: make no change to classes or modules, which other models of the process would see.
    """
    draw = random.Random(seed)
    found = SUBJECTS[subject]
    sampler = draw.choice(list(found.samplers))
    variant = draw.randrange(12)
    if door == "model":
        variant -= variant // 3 % 2 * 3  # a model by itself is called once per step
    world = World(
        seed=seed,
        subject=subject,
        door=door,
        lowering="plain" if door == "reference" or draw.random() < 0.85 else "fused",
        sampler=sampler,
        asked=draw.randint(3, 8),
        variant=variant,
    )
    names = sorted(name for name, change in found.changes.items() if not (private and change.shared))
    return replace(world, runs=tuple(_random_runs(draw, world, found, names, runs)))


def _random_runs(draw: random.Random, world: World, subject: Subject, names: Sequence[str], count: int) -> list[Run]:
    steps = evaluations(world.sampler, world.asked)
    few = draw.sample(names, min(len(names), draw.randint(1, 2)))
    shapes = draw.sample([(1, 0), (1, 0), (2, 0), (1, 1)], 2)
    late = subject.starts_late(world.sampler) and world.door != "model"
    state: dict[str, int] = {}
    weights, made = 0, []
    for _ in range(count):
        for name in few:
            if draw.random() < 0.1:
                state[name] = draw.randrange(subject.changes[name].values)
        if draw.random() < 0.1:
            weights = draw.randrange(3)
        guided = subject.guidance and draw.random() < 0.5
        first = draw.randrange(1, steps) if late and draw.random() < 0.15 else 0
        batch, size = draw.choice(shapes)
        run = Run(
            seed=draw.randrange(2**31),
            batch=batch,
            size=size,
            guided=guided,
            prompt=draw.randrange(PROMPTS),
            first=first,
            interrupted_at=int(10 ** draw.uniform(0, 3.5)) if draw.random() < 0.03 else 0,
            state=tuple(sorted((name, value) for name, value in state.items() if value)),
            weights=weights,
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
    """Up to three events; those that make streams are of one kind, or there would be more streams than are kept."""
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
    elif kind == "prompt in place":  # always to other values: whether old ones came back, nobody could tell
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
    """One change going back and forth. Two calls per step have twice the streams, so half the states."""
    name = draw.choice(list(few))
    now = state.get(name, 0)
    others = [value for value in range(changes[name].values) if value != now]
    pool = [now, *draw.sample(others, min(len(others), 1 if two_calls else MAX_STATES - 1))]
    events = []
    for after in times:
        now = draw.choice([value for value in pool if value != now])
        events.append(Event(after, "change", name, now))
    return events
