"""Runs the demo: checks the parity of a pipeline under a schedule, times it and draws its images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt.demo.measure import Comparison, compare
from harmonica_rt.demo.picture import draw
from harmonica_rt.report import Report
from harmonica_rt.schedule.checks import check_number
from harmonica_rt.untrusted import strict_json

DEFAULT_GUIDANCE = 4.0  # DiTPipeline's own default
DIFFERENCE_SCALE = 10  # brightens the row of differences, which would be too dark to see


@dataclass(frozen=True)
class DemoRequest:
    """What the demo samples, how often, and where its picture goes.

    Attributes:
        labels: one class per image.
        guidance: guidance scale.
        seed: seed of every run.
        repeats: number of timed rounds.
        picture: path of the PNG.
    """

    labels: tuple[int, ...]
    guidance: float
    seed: int
    repeats: int
    picture: Path


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        request: what was sampled and measured.
        parity: compiled against reference, per step.
        latency: uncached against compiled.
        report: the report of the compiled model.
        psnr: peak signal-to-noise ratio of the cached images against the uncached ones, in dB; infinite if equal.
    """

    request: DemoRequest
    parity: hrt.ParityReport
    latency: Comparison
    report: Report
    psnr: float


def run_demo(
    pipeline: Any,
    schedule: hrt.Schedule,
    request: DemoRequest,
    *,
    say: Callable[[str], None],
    count: Callable[[int], None],
) -> DemoResult:
    """Sample uncached, with the reference and compiled; compare, time, draw.

    Args:
        pipeline: a `DiTPipeline`.
        schedule: the schedule; its steps are the inference steps.
        request: what to sample and measure.
        say: called with one line of text as each part begins.
        count: called with the number of each timed round as it begins, from 1.

    Raises:
        ParityError: compiled and reference differ.
    """
    arguments: dict[str, Any] = {
        "class_labels": list(request.labels),
        "num_inference_steps": schedule.steps,
        "guidance_scale": request.guidance,
    }

    def generate() -> NDArray[np.float32]:
        generator = torch.Generator().manual_seed(request.seed)
        images: NDArray[np.float32] = pipeline(**arguments, generator=generator, output_type="np").images
        return images

    say("compile, and compare every step with the reference")
    parity = hrt.verify(pipeline, schedule, seed=request.seed, **arguments)
    say("sample uncached")
    rows = {"uncached": generate()}
    say("sample with the reference")
    hrt.reference(pipeline, schedule)
    rows["reference"] = generate()
    say("sample compiled")
    hrt.compile(pipeline, schedule, strict=True)
    rows["compiled"] = generate()
    compiled = hrt.get_compiled(pipeline)
    say(f"time uncached and compiled in turn, {request.repeats} rounds after a warm-up")
    latency = compare(pipeline, compiled, generate, repeats=request.repeats, begun=count)
    report = compiled.report()
    hrt.uncompile(pipeline)
    say("draw")
    closeness = psnr(rows["uncached"], rows["compiled"])
    title = (
        f"{schedule.steps} steps, CUR {schedule.cur:.0%}: denoiser {latency.denoiser_speedup:.2f}x faster "
        f"(theory {latency.theoretical:.2f}x), "
        + ("equal to uncached" if math.isinf(closeness) else f"{closeness:.1f} dB PSNR to uncached")
    )
    if parity.trajectory_same_bits:
        title += ", compiled = reference bit for bit"
    rows[f"difference x {DIFFERENCE_SCALE}\n|compiled - uncached|"] = difference(rows["uncached"], rows["compiled"])
    draw(rows, schedule, title, request.picture)
    return DemoResult(request, parity, latency, report, closeness)


def guidance_of(model: Path) -> float:
    """The guidance scale that the model was evaluated with (its PROVENANCE.json), or the pipeline's own default.

    Raises:
        HarmonicaError: the record is malformed.
    """
    record = model / "PROVENANCE.json"
    if not record.exists():
        return DEFAULT_GUIDANCE
    try:
        evaluation = strict_json.parse_object(record.read_bytes()).get("evaluation", {})
        if not isinstance(evaluation, dict):
            raise ValueError(f"evaluation is {strict_json.type_name(evaluation)}")
        return check_number(evaluation.get("guidance_scale", DEFAULT_GUIDANCE), "guidance_scale")
    except (ValueError, OSError) as error:
        raise hrt.HarmonicaError(
            f'{record}: expected {{"evaluation": {{"guidance_scale": a number}}}} ({error}); correct it or remove it'
        ) from error


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """`|a - b|` times `DIFFERENCE_SCALE`, at most 1: black where the images agree."""
    scaled: NDArray[np.float32] = np.minimum(np.abs(a - b) * np.float32(DIFFERENCE_SCALE), np.float32(1))
    return scaled


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio of images in 0 ... 1, dB."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
