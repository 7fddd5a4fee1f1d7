"""Lists the cells of the comparison and computes them; each row is saved when it is done, so a run can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows as common
from benchmarks.quality import images
from benchmarks.quality.cost import costs_of
from benchmarks.quality.metrics import bundled_judge
from benchmarks.quality.producers import FULL, PRODUCERS, QUICK, Budget, Point
from harmonica_rt.demo import bundled_model
from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo, Schedule
from harmonica_rt.schedule.files import write_atomically
from harmonica_training.digits import load_pipeline

IMAGES = {"cpu": 1000, "cuda": 5000}  # per published cell
SEEDS = {Point(20, 1.3): (0,), Point(20, 1.5): (0, 1, 2), Point(20, 2.0): (0,), Point(10, 1.3): (0,)}  # on a CPU
ALL_SEEDS = (0, 1, 2)  # on a GPU, at every point
UNCACHED = "uncached"
_ROOT = Path(__file__).parents[2]

Row = dict[str, Any]
"""A row as it stands in the file."""


@dataclass(frozen=True)
class Cell:
    """One method at one point, with one seed for training and images."""

    method: str
    point: Point
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-t{self.point.steps}-{self.point.speedup}x-seed{self.seed}"

    @property
    def uncached(self) -> Cell:
        """The cell of the uncached images that this one is compared with."""
        return Cell(UNCACHED, Point(self.point.steps, 1.0), self.seed)


@dataclass(frozen=True)
class Settings:
    """How cells are computed, and where results are saved.

    Attributes:
        device: cpu or cuda.
        count: images per cell.
        budget: what training may spend.
        rows: JSON file of the rows.
        schedules: folder of the schedules.
        work: folder of the uncached images.
        picture: file of the plot.
    """

    device: str
    count: int
    budget: Budget
    rows: Path
    schedules: Path
    work: Path
    picture: Path

    @classmethod
    def of(cls, count: int, *, quick: bool, device: str = "cpu", root: Path = _ROOT) -> Settings:
        """Settings of the published results for `IMAGES` images, else of a trial, whose rows stay in the work folder.

        Schedules do not depend on the number of images, so that only a quick run has its own.
        """
        work = root / ".bench" / f"quality-{device}"
        trial = work / ("quick" if quick else "trial") / str(count)
        published = count == IMAGES[device] and not quick
        return cls(
            device=device,
            count=count,
            budget=QUICK if quick else FULL,
            rows=(common.RESULTS if published else trial) / f"quality-{device}.json",
            schedules=trial / "schedules" if quick else common.RESULTS / "schedules" / device,
            work=work,
            picture=root / "docs" / f"quality-{device}.png" if published else trial / f"quality-{device}.png",
        )


def cells(
    methods: Collection[str] | None = None,
    points: Collection[Point] | None = None,
    seeds: Collection[int] | None = None,
    device: str = "cpu",
) -> list[Cell]:
    """The cells of the matrix with one of the given methods, points and seeds; None stands for all."""
    return [
        Cell(method, point, seed)
        for point, planned in SEEDS.items()
        for method in PRODUCERS
        for seed in (planned if device == "cpu" else ALL_SEEDS)
        if (methods is None or method in methods)
        and (points is None or point in points)
        and (seeds is None or seed in seeds)
    ]


def run(chosen: Iterable[Cell], settings: Settings, *, workers: int = 1) -> Iterator[Row]:
    """Finish the cells that have no row yet, and yield each new row after it was written.

    Uncached images come first; their figures are rows too.

    Args:
        chosen: the cells.
        settings: how they are computed and where they are saved.
        workers: worker processes of one thread each; 1 works in this process, with all its threads.
    """
    done = {_key(row) for row in common.read(settings.rows)}
    todo = [cell for cell in chosen if _key(_head(cell)) not in done]
    truths = [
        truth
        for truth in dict.fromkeys(cell.uncached for cell in todo)
        if _key(_head(truth)) not in done or not _uncached_path(truth, settings).exists()
    ]
    for stage in (truths, todo):  # a cell needs the uncached images
        for row in _each(functools.partial(finish, settings=settings), stage, workers):
            _add(settings.rows, row)
            yield row


def finish(cell: Cell, settings: Settings) -> Row:
    """Make or load the cell's schedule, sample with it and measure the images; returns the row."""
    pipeline = _pipeline(settings.device)
    schedule = _schedule(cell, settings, pipeline)
    found = images.generate(pipeline, schedule, count=settings.count, seed=cell.seed)
    path = _uncached_path(cell.uncached, settings)
    if cell.method == UNCACHED:
        images.save(found, path)
    measured = bundled_judge().measure(found, images.load(path), images.requested_labels(settings.count))
    made_by = schedule.made_by
    figures = {
        "images": settings.count,
        "speedup": cell.point.steps / schedule.steps * costs_of(pipeline.transformer).speedup(schedule.compute),
        "cur": schedule.cur,
        "computed_steps": schedule.steps,
        "training_seconds": made_by.hyper_parameters.get("seconds", 0.0) if made_by else 0.0,
        **dataclasses.asdict(measured),
    }
    return {**_head(cell), **common.rounded(figures), "machine": common.machine()}


def _schedule(cell: Cell, settings: Settings, pipeline: Any) -> Schedule:
    """Load the cell's schedule, or make it with its producer and save it."""
    if cell.method == UNCACHED:
        return Schedule.all_compute(steps=cell.point.steps, sites=costs_of(pipeline.transformer).sites)
    path = settings.schedules / f"{cell}.json"
    if path.exists():
        return Schedule.load(path)
    produced = PRODUCERS[cell.method](pipeline, cell.point, cell.seed, settings.budget)
    made_by = produced.schedule.made_by or MadeBy(cell.method)
    if produced.seconds:
        parameters = {**made_by.hyper_parameters, "seconds": round(produced.seconds, 1)}
        made_by = dataclasses.replace(made_by, hyper_parameters=parameters)
    schedule = produced.schedule.with_provenance(
        model=ModelInfo.of(pipeline.transformer),
        sampler=SamplerInfo.of(pipeline.scheduler),
        guidance=images.GUIDANCE,
        made_by=made_by,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule.save(path)
    return schedule


def _each(function: Callable[[Cell], Row], jobs: list[Cell], workers: int) -> Iterator[Row]:
    """Yield the results of `function` as they come; the first failure cancels the jobs that have not begun."""
    if workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for future in as_completed([pool.submit(function, job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _add(path: Path, row: Row) -> None:
    """Add a row to the file, where it replaces an older row of the same cell."""
    kept = [other for other in common.read(path) if _key(other) != _key(row)]
    lines = [json.dumps(other) for other in sorted([*kept, row], key=_key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, '{\n  "rows": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")


def _head(cell: Cell) -> Row:
    return {
        "benchmark": "quality",
        "method": cell.method,
        "steps": cell.point.steps,
        "target_speedup": cell.point.speedup,
        "seed": cell.seed,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return row["steps"], row["target_speedup"], row["method"], row["seed"]


def _uncached_path(cell: Cell, settings: Settings) -> Path:
    return images.uncached_path(settings.work, steps=cell.point.steps, seed=cell.seed, count=settings.count)


@functools.cache
def _pipeline(device: str) -> Any:
    """The bundled pipeline, loaded once per process."""
    return load_pipeline(bundled_model()).to(device)
