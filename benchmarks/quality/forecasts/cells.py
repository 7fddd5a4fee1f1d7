"""The cells of the comparison, and their rows."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harmonica_rt as hrt
from benchmarks import rows as common
from benchmarks.quality import images
from benchmarks.quality.forecasts.methods import LEVELS, METHODS, STEPS, Setting, schedules
from benchmarks.quality.forecasts.peers import PEERS, SETTINGS, counted_speedup, why_not
from benchmarks.quality.metrics import psnr
from harmonica_rt.demo import bundled_model
from harmonica_training.digits import load_pipeline

SEEDS = (0, 1, 2)
FIT_SEED = 900  # plus the cell's: of the noise that weights are fitted to
TUNING_SEED, TUNING_IMAGES = 777, 6  # of the noise that settings are chosen with
BEST = ", best"  # follows the name of a method with a setting of ours
PEER = "peer"  # the level of cells of other libraries
KEY = ("schedule", "level", "method", "seed")

Row = dict[str, Any]


class Prepared(NamedTuple):
    """A pipeline that runs as a cell says.

    Attributes:
        sample: (number of images, seed) -> images.
        speedup: the theoretical one: FLOPs of an uncached run divided by those of such a run, after the first sample.
    """

    sample: Callable[[int, int], Tensor]
    speedup: Callable[[], float]


@dataclass(frozen=True)
class Cell:
    """One method on one schedule and level of sites, with one seed."""

    schedule: str
    level: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The method or the peer, whatever its setting."""
        return self.method.removesuffix(BEST)


def cells() -> list[Cell]:
    """All cells; the bundled schedule has sub-layers only, and other libraries cannot run it."""
    named = [(level, name) for level, names in LEVELS.items() for name in names]
    ours = [(level, method) for level, name in named for method in _variants(level, name)]
    kinds = ours + [(PEER, peer) for peer in PEERS]
    return [
        Cell(schedule, level, method, seed)
        for seed in SEEDS
        for schedule in ("every(2)", "every(3)", "bundled")
        for level, method in kinds
        if schedule != "bundled" or level == "sublayer"
    ]


def _variants(level: str, name: str) -> list[str]:
    """A method with its default setting and, on sub-layers, with the best, if there is a choice."""
    return [name, name + BEST] if level == "sublayer" and METHODS[name].others else [name]


def run(pipeline: Any, count: int, path: Path, chosen: Iterable[Cell]) -> Iterator[Row]:
    """Finish the chosen cells that have no row in the file yet, and yield each new row after it was written."""
    rows = common.read(path)
    done = {tuple(row[name] for name in KEY) for row in rows}
    comparison = Comparison(pipeline, count, settings_of(rows))
    for cell in chosen:
        if dataclasses.astuple(cell) not in done:
            row = comparison.row(cell)
            common.merge(path, [row], KEY)
            yield row


def settings_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], Setting]:
    """Schedule, level and method -> the setting of its rows, which all seeds share."""
    return {(row["schedule"], row["level"], row["method"]): row["setting"] for row in rows if "setting" in row}


class Comparison:
    """Computes cells with one pipeline, of a number of images each; keeps chosen settings and uncached images.

    Args:
        pipeline: the bundled pipeline, uncached. Other libraries get one of their own: what they change may stay.
        count: images per cell.
        known: settings that were chosen in an earlier run.
    """

    def __init__(self, pipeline: Any, count: int, known: Mapping[tuple[str, str, str], Setting]) -> None:
        self._pipeline = pipeline
        self._count = count
        self._known = known
        self._uncached = functools.cache(lambda count, seed: sample(pipeline, count, seed))
        self._best = functools.cache(self._chosen)

    def row(self, cell: Cell) -> Row:
        """The row of a cell; only the reason if it cannot be measured."""
        head = {"benchmark": "forecasts", "steps": STEPS, **dataclasses.asdict(cell)}
        if cell.level == PEER and (reason := why_not(cell.name)):
            return {**head, "reason": reason}
        tuned = cell.level == PEER or cell.method != cell.name
        setting = self._best(dataclasses.replace(cell, seed=0)) if tuned else METHODS[cell.name].default
        truth = self._uncached(self._count, cell.seed)
        started = time.perf_counter()
        with self.prepared(cell, setting) as made:
            seconds = time.perf_counter() - started
            scores = _scores(made.sample(self._count, cell.seed), truth)
            speedup = made.speedup()
        figures = {"images": self._count, "speedup": speedup, "psnr": float(scores.mean()), "prepared_in": seconds}
        each = [round(float(score), 3) for score in scores]
        return {**head, "setting": dict(setting), **common.rounded(figures), "psnr_of_images": each}

    def prepared(self, cell: Cell, setting: Setting) -> AbstractContextManager[Prepared]:
        """A context in which a pipeline runs as the cell says."""
        if cell.level == PEER:
            return _peer(cell, setting)
        schedule = schedules(self._pipeline.transformer, cell.level)[cell.schedule]
        weighted = METHODS[cell.name].weigh(self._pipeline, schedule, FIT_SEED + cell.seed, **setting)
        return _compiled(self._pipeline, weighted)

    def _chosen(self, cell: Cell) -> Setting:
        """The best setting for a cell with the tuning noise."""
        key = cell.schedule, cell.level, cell.method
        if key in self._known:
            return self._known[key]
        settings = SETTINGS[cell.name] if cell.level == PEER else METHODS[cell.name].all_settings
        truth = self._uncached(TUNING_IMAGES, TUNING_SEED)
        scores = []
        for setting in settings:
            with self.prepared(cell, setting) as made:
                scores.append(float(_scores(made.sample(TUNING_IMAGES, TUNING_SEED), truth).mean()))
        return settings[max(range(len(scores)), key=scores.__getitem__)]


def sample(pipeline: Callable[..., Any], count: int, seed: int) -> Tensor:
    """uint8 images `[count, 1, H, W]` of a pipeline as it is, each from noise of its own."""
    made = pipeline(
        class_labels=images.requested_labels(count).tolist(),
        guidance_scale=images.GUIDANCE,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed * images.SEED_STRIDE + index) for index in range(count)],
        output_type="pt",
    ).images
    return (made * 255).round().byte().cpu()


def _scores(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each image to the uncached image of the same noise, dB `[count]`."""
    return psnr(found.float() / 255, truth.float() / 255)


@contextmanager
def _peer(cell: Cell, setting: Setting) -> Iterator[Prepared]:
    pipeline = bundled_pipeline()
    k = int(cell.schedule.removeprefix("every(").removesuffix(")"))
    with PEERS[cell.name](pipeline, k, **setting) as call:
        made = functools.partial(sample, call)
        yield Prepared(made, lambda: counted_speedup(pipeline.transformer, lambda: made(1, 0)))


@contextmanager
def _compiled(pipeline: Any, schedule: hrt.Schedule) -> Iterator[Prepared]:
    hrt.compile(pipeline, schedule, strict=True)
    try:
        yield Prepared(
            functools.partial(sample, pipeline),
            lambda: hrt.get_compiled(pipeline).report().plans[0].theoretical_speedup,
        )
    finally:
        hrt.uncompile(pipeline)


def bundled_pipeline() -> Any:
    """The bundled pipeline, without a progress bar."""
    pipeline = load_pipeline(bundled_model())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
