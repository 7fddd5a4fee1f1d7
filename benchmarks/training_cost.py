"""What training costs: time and memory of an iteration, compared with the work that the released trainer does.

The released trainer (ModelTC/HarmoniCa) differs in three ways: the model's parameters are not frozen, so that their
gradients are computed and discarded; the teacher runs with gradients enabled, and the loss is differentiated through it
too; lambda costs a whole run from noise for every step. Router, sampler, batch and loss are the same. In forwards per
step, at 20 steps and a renewal every 500, it needs one for the student, one for the teacher, two or four for the
gradients and 0.8 for lambda; ours needs one, one, one and 0.4. Optimisers are left out: a step of AdamW takes 2 ms, a
walk many seconds.

`ours` is the same training at less cost. `ours, by default` is what `train` does by default: it renews lambda far more
often and measures schedules on separate samples, so that its iterations cost more and fewer are needed.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

from benchmarks import models
from benchmarks.compile_cost import PeakMemory, resident_bytes
from benchmarks.rows import Row, spread_row
from benchmarks.timing import Spread, interleaved
from harmonica_rt import find_sites
from harmonica_rt.demo import bundled_model
from harmonica_training.cached_forward import Cache, CachedForward, detached, first_tensor, frozen
from harmonica_training.config import TrainConfig
from harmonica_training.digits import load_pipeline
from harmonica_training.iepo import ImageErrors
from harmonica_training.sdt import step_losses
from harmonica_training.settling import LOOK_EVERY
from harmonica_training.trainer import train
from harmonica_training.walk import DenoiserCall, StreamKey, Walker

RENEW_EVERY = 500  # steps, as in the paper
GIB = 2**30

Kind = Literal["ours", "released", "released, teacher detached"]


@dataclass(frozen=True)
class Case:
    """A pipeline with a batch.

    Attributes:
        name: model, steps and batch.
        walker: runs the pipeline's steps.
        cached: the denoiser with its sites' outputs cached.
        inputs: arguments of the pipeline's call.
        samples: number of samples in the batch.
    """

    name: str
    walker: Walker
    cached: CachedForward
    inputs: dict[str, Any]
    samples: int

    @property
    def scores(self) -> Tensor:
        """Random scores, `[steps, sites]`."""
        scores = torch.rand(self.walker.steps, len(self.cached.sites), generator=torch.Generator().manual_seed(0))
        scores[0] = 1.0
        return scores

    def generators(self) -> list[torch.Generator]:
        """New generators with the same seeds each time, one per sample."""
        return [torch.Generator().manual_seed(index) for index in range(self.samples)]


def bundled(samples: int, steps: int) -> Case:
    """The bundled model with guidance."""
    pipeline = load_pipeline(bundled_model())
    sites = find_sites(pipeline.transformer)
    walker = Walker(pipeline, steps=steps, arguments={"guidance_scale": 2.0})
    inputs = {"class_labels": [index % 10 for index in range(samples)]}
    name = f"bundled, {steps} steps, batch {samples} (guidance: {2 * samples})"
    return Case(name, walker, CachedForward(pipeline.transformer, sites), inputs, samples)


def dit_xl_2(steps: int) -> Case:
    """DiT-XL/2 at 256 x 256, one sample with guidance, blocks checkpointed."""
    transformer = models.dit(layers=28, heads=16, head_dim=72)
    pipeline = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), DDIMScheduler())
    walker = Walker(pipeline, steps=steps, arguments={"guidance_scale": 1.5})
    cached = CachedForward(transformer, find_sites(transformer), checkpointing=True)
    name = f"DiT-XL/2 256, {steps} steps, batch 1 (guidance: 2), checkpointing"
    return Case(name, walker, cached, {"class_labels": [1]}, 1)


def iteration(case: Case) -> Tensor:
    """One iteration of ours without lambda; returns the gradient with respect to the scores `[steps, sites]`."""
    with frozen(case.walker.denoiser):
        return step_losses(
            case.walker,
            case.cached,
            case.inputs,
            case.generators(),
            scores=case.scores,
            computes=(case.scores > 0.1).numpy(),
            holds="computed",
            precision=contextlib.nullcontext,
        ).by_score


def released_iteration(case: Case, *, through_teacher: bool) -> Tensor:
    """The same gradient `[steps, sites]`, with the work of the released trainer.

    `through_teacher=False` omits the gradient through the teacher, which changes only the parameters' gradients.
    """
    model, scores = case.walker.denoiser.eval(), case.scores.requires_grad_()
    caches: dict[StreamKey, Cache] = {}

    def denoise(call: DenoiserCall) -> Any:
        if call.step == 0:
            output, caches[call.stream] = case.cached.compute(call.forward)
            return output
        with torch.enable_grad():
            teacher = first_tensor(call.forward())  # its graph is kept until the end of the step, used or not
            computes = (scores[call.step] > 0.1).tolist()
            output, caches[call.stream] = case.cached.blend(
                call.forward, scores[call.step], computes, caches[call.stream], "computed"
            )
            target = teacher if through_teacher else teacher.detach()
            loss = (first_tensor(output) - target).square().mean()
        model.zero_grad()  # only now: the parameters' gradients of the previous step are held until here
        loss.backward()
        return detached(output)

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    case.walker.walk(case.inputs, case.generators(), denoise)
    model.zero_grad()
    if scores.grad is None:
        raise RuntimeError("the released iteration gave no gradient")
    return scores.grad


def renewal(case: Case, *, share_prefixes: bool) -> Tensor:
    """Compute lambda once; returns one weight per step."""
    errors = ImageErrors(
        case.walker,
        case.cached,
        case.scores,
        (case.scores > 0.1).numpy(),
        case.inputs,
        case.generators,
        holds="computed",
        precision=contextlib.nullcontext,
    )
    return errors.weights("progressive", share_prefixes=share_prefixes)


def by_default(case: Case) -> float:
    """Mean seconds of an iteration of `train` with its defaults, over one period of its less frequent work.

    It trains the bundled model with as many samples and steps as `case`.
    """
    config = TrainConfig(steps=case.walker.steps, batch=case.samples, target_speedup=1.5, guidance=2.0)
    period = math.lcm(config.renew_every, LOOK_EVERY)
    history = train(load_pipeline(bundled_model()), replace(config, iterations=period)).history
    return sum(record.seconds for record in history) / period


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure time in this process, interleaved, and memory in a new process for each kind."""
    case = bundled(2 if quick else 8, 4 if quick else 20)
    seconds = interleaved(
        {
            "ours": lambda: iteration(case),
            "released": lambda: released_iteration(case, through_teacher=True),
            "released, teacher detached": lambda: released_iteration(case, through_teacher=False),
        },
        repeats,
    )
    renewals = interleaved(
        {
            "ours": lambda: renewal(case, share_prefixes=True),
            "released": lambda: renewal(case, share_prefixes=False),
        },
        1,  # a renewal takes as long as many iterations, and the ratio is known from the number of forwards
    )
    share = case.walker.steps / RENEW_EVERY
    ours = _sums(seconds["ours"], renewals["ours"], share)
    default = by_default(case)
    rows = [_row(case, "ours", "iteration, lambda amortised", ours, "s")]
    rows += [_row(case, kind, "walk alone", seconds[kind], "s") for kind in seconds]
    rows.append(_row(case, "ours, by default", "iteration, all included", [default], "s"))
    rows.append(_row(case, "ours", "lambda, once", renewals["ours"], "s"))
    rows.append(_row(case, "released", "lambda, once", renewals["released"], "s"))
    peaks = {kind: _in_fresh_process(kind, quick) for kind in seconds}
    rows.append(_row(case, "ours", "memory of an iteration", [peaks["ours"]], "bytes"))
    for kind in ("released", "released, teacher detached"):
        theirs = _sums(seconds[kind], renewals["released"], share)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows += [
            _row(case, kind, "iteration, lambda amortised", theirs, "s"),
            _row(case, kind, "time, ours / theirs", ratios, "ratio", "at most 0.75"),
            _row(case, kind, "time, ours by default / theirs", [default / Spread.of(theirs).p50], "ratio"),
            _row(case, kind, "memory of an iteration", [peaks[kind]], "bytes"),
            _row(case, kind, "memory, ours / theirs", [peaks["ours"] / peaks[kind]], "ratio", "at most 0.6"),
        ]
    if not quick:
        rows += _in_process(_dit_xl_rows)
    return rows


def _dit_xl_rows() -> list[Row]:
    with PeakMemory() as peak:
        case = dit_xl_2(3)
        seconds = interleaved({"ours": lambda: iteration(case)}, 1)["ours"]
    steps, peak_metric = case.walker.steps - 1, "peak of the process, weights and all"
    return [
        _row(case, "ours", "step of SDT", [seconds[0] / steps], "s"),
        Row("training_cost", case.name, "ours", peak_metric, peak.peak, "bytes", target=f"at most {12 * GIB}"),
    ]


def _peak(kind: Kind, quick: bool) -> int:
    """Growth of the resident size in one iteration, in bytes."""
    case = bundled(2 if quick else 8, 3)  # what a step holds does not depend on the number of steps
    plain = case.walker.walk(case.inputs, case.generators(), lambda call: call.forward())
    del plain
    before = resident_bytes()
    with PeakMemory() as memory:
        if kind == "ours":
            iteration(case)
        else:
            released_iteration(case, through_teacher=kind == "released")
    return memory.peak - before


def _in_fresh_process(kind: str, quick: bool) -> float:
    return float(_in_process(_peak, kind, quick))


def _in_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _sums(iterations: list[float], renewals: list[float], share: float) -> list[float]:
    return [seconds + renewals[0] * share for seconds in iterations]


def _row(case: Case, kind: str, metric: str, samples: list[float], unit: str, target: str | None = None) -> Row:
    return spread_row("training_cost", case.name, kind, metric, samples, unit, target)
