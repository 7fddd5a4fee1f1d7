"""Runs many worlds, and counts runs by kind of world and faults by what is wrong."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.rows import Row
from benchmarks.soak.concurrent_runs import faults_of_separate_pipelines, faults_of_shared_denoiser
from benchmarks.soak.pair import Pair
from benchmarks.soak.random_world import random_world
from benchmarks.soak.world import Run, World

FAULTS = (
    "wrong image",
    "wrong call from outside",
    "undocumented error",
    "refused",
    "other entries reused",
    "not compiled",
)
OFTEN = 40  # runs per world with a pipeline of diffusers, which takes longer to capture; others have twice as many
SELDOM = 10  # runs per world behind torch.compile, which traces again after each change
THREADS = 3
PIECE = 200  # most runs per piece


@dataclass(frozen=True)
class Kind:
    """A kind of world.

    Attributes:
        name: its name, which also seeds its worlds.
        subject: name of the pipeline in `SUBJECTS`.
        share: its share of all runs.
        interface: how the pipeline is compiled; see `World`.
        runs: runs per world.
        together: how runs overlap: "" for not at all, "apart" for threads with one pipeline each, "threads" or
            "coroutines" for those that share one denoiser.
    """

    name: str
    subject: str
    share: float
    interface: str = "compile"
    runs: int = OFTEN
    together: str = ""


KINDS = (
    Kind("a pipeline of one's own", "loop", 0.58, runs=2 * OFTEN),
    Kind("a model by itself", "loop", 0.08, interface="model", runs=2 * OFTEN),
    Kind("the reference engine", "loop", 0.02, interface="reference", runs=2 * OFTEN),
    Kind("behind torch.compile", "loop", 0.01, interface="torch.compile", runs=SELDOM),
    Kind("PixArt-alpha behind torch.compile", "pixart", 0.005, interface="torch.compile", runs=SELDOM),
    Kind("threads, a pipeline each", "loop", 0.08, together="apart"),
    Kind("threads over one denoiser", "loop", 0.02, together="threads"),
    Kind("coroutines over one denoiser", "loop", 0.02, together="coroutines"),
    Kind("threads over one model by itself", "loop", 0.01, interface="model", together="threads"),
    Kind("coroutines over one model by itself", "loop", 0.01, interface="model", together="coroutines"),
    Kind("DiT", "dit", 0.025),
    Kind("PixArt-alpha", "pixart", 0.035),
    Kind("SD3", "sd3", 0.03),
    Kind("SD3 from an image", "sd3, from an image", 0.02),
    Kind("SD3 with LoRAs", "sd3, LoRA", 0.02),
    Kind("Flux", "flux", 0.02),
    Kind("Flux with an image prompt", "flux, image prompt", 0.02),
)


@dataclass(frozen=True)
class Fault:
    """A run that went wrong. `python -m benchmarks soak --kind KIND --world SEED` reproduces it.

    Attributes:
        kind: name of the kind of world.
        world: the world.
        run: index of the run in the world.
        what: one of `FAULTS`, a colon, and the details.
    """

    kind: str
    world: World
    run: int
    what: str

    def __str__(self) -> str:
        world = replace(self.world, runs=())
        return (
            f"--kind {self.kind!r} --world {self.world.seed}, run {self.run}: {self.what}\n"
            f"  in {world}\n  run {self.world.runs[self.run]}"
        )


@dataclass
class Tally:
    """Runs and faults of one kind of world."""

    runs: int = 0
    faults: list[Fault] = field(default_factory=list)

    def rows(self, kind: str) -> list[Row]:
        """One row for the number of runs, and one for each kind of fault."""
        counted = Counter(fault.what.partition(":")[0] for fault in self.faults)
        found = [Row("soak", kind, "random", "runs", self.runs, "count")]
        return found + [Row("soak", kind, "random", what, counted[what], "count", target="0") for what in FAULTS]


@dataclass(frozen=True)
class Piece:
    """Some runs of one kind, in worlds that are drawn from `seed`."""

    kind: Kind
    seed: str
    runs: int

    def run(self, tell: Callable[[Fault], None]) -> Tally:
        """Do at least `runs` runs; `tell` is called with each fault when it is found."""
        tally, draw = Tally(), random.Random(self.seed)
        while tally.runs < self.runs:
            for fault in faults_of(self.kind, draw.randrange(10**9), tally, self.runs - tally.runs):
                tally.faults.append(fault)
                tell(fault)
        return tally


def pieces(count: int, seed: int, kinds: Sequence[Kind] = ()) -> list[Piece]:
    """Divide `count` runs among the kinds by their shares, in pieces that can run in any order.

    Args:
        count: number of runs.
        seed: seed of all worlds.
        kinds: the kinds; all of `KINDS` if empty.
    """
    return [
        Piece(kind, f"{seed}, {kind.name}, {begin}", min(PIECE, round(kind.share * count) - begin))
        for kind in kinds or KINDS
        for begin in range(0, round(kind.share * count), PIECE)
    ]


def added_up(done: Iterable[tuple[Piece, Tally]]) -> dict[str, Tally]:
    """Sum the tallies by the name of the kind."""
    tallies: dict[str, Tally] = {}
    for piece, tally in done:
        found = tallies.setdefault(piece.kind.name, Tally())
        found.runs += tally.runs
        found.faults += tally.faults
    return tallies


def faults_of(kind: Kind, seed: int, tally: Tally, most: int | None = None) -> Iterator[Fault]:
    """The faults of one world; it is built again after each.

    Args:
        kind: the kind of world.
        seed: seed of the world.
        tally: its runs are counted here.
        most: do at most this many runs; None for all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.together == "apart":
            yield from _apart(kind, seed, tally, most or kind.runs)
        elif kind.together:
            yield from _shared(kind, seed, tally, most or kind.runs)
        else:
            yield from _alone(kind, seed, tally, most or kind.runs)


def _alone(kind: Kind, seed: int, tally: Tally, most: int) -> Iterator[Fault]:
    world = random_world(seed, runs=kind.runs, subject=kind.subject, interface=kind.interface)
    pair = Pair(world)
    try:
        for index, run in enumerate(world.runs[:most]):
            tally.runs += 1
            what = pair.fault(run)
            if what is not None:
                yield Fault(kind.name, world, index, what)
                pair.close()
                pair = Pair(world)
    finally:
        pair.close()


def _apart(kind: Kind, seed: int, tally: Tally, most: int) -> Iterator[Fault]:
    """Worlds with consecutive seeds, one per thread."""
    worlds = [
        random_world(seed + index, runs=kind.runs // THREADS, subject=kind.subject, private=True)
        for index in range(THREADS)
    ]
    worlds = [replace(world, runs=tuple(replace(run, interrupted_at=0) for run in world.runs)) for world in worlds]
    pairs = [Pair(world) for world in worlds]
    for index in range(min(kind.runs, most) // THREADS or 1):
        tally.runs += THREADS
        found = faults_of_separate_pipelines(pairs, [world.runs[index] for world in worlds])
        for world, what in zip(worlds, found, strict=True):
            if what is not None:
                yield Fault(kind.name, world, index, what)
        if any(found):
            pairs = [Pair(world) for world in worlds]


def _shared(kind: Kind, seed: int, tally: Tally, most: int) -> Iterator[Fault]:
    """Two runs at once, then one alone, which must be right."""
    world = random_world(seed, runs=kind.runs, subject=kind.subject, interface=kind.interface)
    plain = [Run(replace(run.request, size=0, first=0)) for run in world.runs]
    world = replace(world, runs=tuple(plain), lowering="plain")
    draw, pair = random.Random(seed), Pair(world)
    for index in range(0, max(min(kind.runs, most) - 2, 1), 3):
        tally.runs += 3
        found = faults_of_shared_denoiser(pair, plain[index : index + 2], draw, threads=kind.together == "threads")
        found.append(pair.fault(plain[index + 2]))
        for offset, what in enumerate(found):
            if what is not None:
                yield Fault(kind.name, world, index + offset, what)
        if any(found):
            pair = Pair(world)
