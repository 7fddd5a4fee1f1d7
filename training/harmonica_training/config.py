"""`TrainConfig`: how a schedule is trained, with every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from harmonica_training.cached_forward import CacheHolds
from harmonica_training.errors import TrainingError
from harmonica_training.iepo import ImageError

Gates = Literal["soft", "hard"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainConfig:
    """How a schedule is trained. Exactly one of `target_speedup`, `target_cur` and `beta` says how much to cache.

    HarmoniCa (arXiv 2410.01723) learns a score r in 0 ... 1 for every step and site. It minimises the squared errors of
    all steps of a run under the cache (step-wise denoising training, SDT), plus beta times the cost of computing. IEPO,
    its image-error-proxy objective, weights the error of each step by lambda: how much caching there costs the image.

    Attributes:
        steps: `num_inference_steps` of the pipeline's call; the schedule has as many steps as the run (its NFE).
        target_speedup: theoretical speed-up to reach, FLOPs of the uncached model / FLOPs left.
        target_cur: cache utilisation ratio to reach, 0 ... 1.
        beta: fixed weight of the cost of computing; with a target, beta is chosen and adapted.
        guidance: `guidance_scale` of the call; None leaves the pipeline's own default.
        arguments: further arguments of the call (height, width, ...).
        patterns: globs that choose the sites; None chooses them by the rule of `find_sites`.
        image_error: how IEPO measures lambda every `renew_every` iterations; None weights all steps alike (SDT alone).
        renew_every: iterations between measurements of lambda, the paper's C. An iteration goes through all steps, so
            C = 500 at 20 steps corresponds to 25.
        iterations: number of runs. The paper's 20,000 optimiser steps at 20 steps correspond to 1,000.
        batch: samples per iteration, over all processes.
        learning_rate: learning rate of AdamW, with weight decay 0.
        decay: share of the iterations, at the end, over which the learning rate falls to a tenth.
        tau: threshold; a site computes if r > tau.
        initial: mean of the initial logits.
        spread: standard deviation of the initial logits.
        coherence: how much the sites of a step move together, 0 (paper) ... 1: the share of each logit's gradient, and
            of its initial spread, that is common to its step.
        cache_holds: what a site's cache takes when it computes: the computed output (as with a static schedule) or the
            blended one (as in the released code).
        gates: soft blends sites by r, as in the paper; hard computes if r > tau and otherwise reuses, as the schedule
            will, and passes the gradient on to r (straight-through, an option of the released code).
        exchanges: with hard gates and a target, how many pairs of steps of the best schedule so far are swapped per
            iteration, to see whether its images improve.
        validation_batches: with hard gates and a target, on how many batches the images of a schedule are measured.
        precision: precision of forwards, by autocast; fp32 keeps the pipeline's dtype.
        checkpointing: recompute the blocks' activations for the gradient instead of keeping them.
        checkpoint_every: iterations between checkpoints.
        seed: seed of conditions and noise.

    Raises:
        TrainingError: a value is out of its range.
    """

    steps: int
    target_speedup: float | None = None
    target_cur: float | None = None
    beta: float | None = None
    guidance: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    patterns: tuple[str, ...] | None = None
    image_error: ImageError | None = "sensitivity"
    renew_every: int = 5
    iterations: int = 100
    batch: int = 8
    learning_rate: float = 0.1
    decay: float = 0.7
    tau: float = 0.1
    initial: float = 0.0
    spread: float = 1.5
    coherence: float = 1.0
    cache_holds: CacheHolds = "computed"
    gates: Gates = "hard"
    exchanges: int = 8
    validation_batches: int = 1
    precision: Precision = "fp32"
    checkpointing: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        chosen = [name for name in ("target_speedup", "target_cur", "beta") if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise TrainingError(f"give exactly one of target_speedup, target_cur and beta; got {chosen or 'none'}")
        for name in ("steps", "renew_every", "iterations", "batch", "validation_batches", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TrainingError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if isinstance(self.exchanges, bool) or not isinstance(self.exchanges, int) or self.exchanges < 0:
            raise TrainingError(f"exchanges: expected a whole number of at least 0, got {self.exchanges!r}")
        if self.steps < 2:
            raise TrainingError("steps: a run of one step has nothing to reuse; expected at least 2")
        ranges = {
            "target_speedup": (1.0, math.inf),
            "target_cur": (0.0, 1.0),
            "beta": (0.0, math.inf),
            "learning_rate": (0.0, math.inf),
            "decay": (0.0, 1.0),
            "coherence": (0.0, 1.0),
            "tau": (0.0, 1.0),
        }
        for name in (*ranges, "guidance", "initial", "spread"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TrainingError(f"{name}: expected a number, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TrainingError(f"seed: expected a whole number, got {self.seed!r}")
        if isinstance(self.patterns, str):
            raise TrainingError(
                f"patterns: expected several globs, got the one {self.patterns!r}; write ({self.patterns!r},)"
            )
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"{name}: expected {low:g} ... {high:g}, got {value!r}")
        if not 0 < self.tau < 1:
            raise TrainingError(f"tau: expected a number between 0 and 1, got {self.tau!r}")
        choices = {
            "image_error": ("leave-one-out", "progressive", "sensitivity", None),
            "cache_holds": ("computed", "blended"),
            "gates": ("soft", "hard"),
            "precision": ("fp32", "bf16", "fp16"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise TrainingError(f"{name}: expected one of {values}, got {getattr(self, name)!r}")

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "arguments": dict(self.arguments), "patterns": self.patterns and list(self.patterns)}
