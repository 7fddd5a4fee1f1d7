"""Image-error-proxy objective (IEPO), arXiv 2410.01723, section 4.2: how much caching at each step costs the image.

The weight lambda of a step is the squared error that caching at this step makes in the final latents:

- leave-one-out (paper): all steps cached, against the same with caching disabled at this step only;
- progressive (released code): steps 0 ... t cached, against steps 0 ... t-1 cached, the others uncached;
- sensitivity (ours): leave-one-out, divided by the error of the prediction at this step. The loss multiplies lambda by
  that error, so the other two count it twice: a last step, say, whose prediction is far off at no cost to the image,
  would always be computed. With sensitivity the loss is an estimate of the image error.

Each method compares runs that share their first steps with one run that caches everywhere. So that run is made once,
and at each step another branches off from its state. This takes half the denoiser calls and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training.cached_forward import Cache, CachedForward, CacheHolds, cloned
from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop, StreamKey
from harmonica_training.sdt import Precision

ImageError = Literal["leave-one-out", "progressive", "sensitivity"]

Caches = dict[StreamKey, Cache]
Recorded = dict[tuple[int, StreamKey], Any]


class ImageErrors:
    """Errors in the final latents of runs that cache at some steps and not at others.

    Args:
        loop: runs the pipeline's denoising loop.
        cached: runs its denoiser with caching.
        scores: r, `[steps, sites]`.
        computes: bool `[steps, sites]`, r > tau.
        inputs: conditions of the B samples.
        generators: makes B generators, the same each time.
        holds: see `CachedForward.blend`.
        precision: makes a context for forwards.
    """

    def __init__(
        self,
        loop: DenoisingLoop,
        cached: CachedForward,
        scores: Tensor,
        computes: NDArray[np.bool_],
        inputs: Mapping[str, Any],
        generators: Callable[[], Sequence[torch.Generator]],
        *,
        holds: CacheHolds,
        precision: Precision,
    ) -> None:
        self._loop = loop
        self._cached = cached
        self._scores = scores
        self._computes = computes
        self._inputs = inputs
        self._generators = generators
        self._holds = holds
        self._precision = precision

    def weights(self, method: ImageError | None, *, share_prefixes: bool = True) -> Tensor:
        """lambda, float64 `[steps]`: mean squared error of the final latents; 0 at the first step.

        With `share_prefixes=False` every run starts from noise: the plain definition, for verification.
        """
        steps = len(self._scores)
        caching = _progressive if method == "progressive" else _leave_one_out
        ends: dict[int, Tensor] = {}
        if share_prefixes:
            everywhere = self._run(lambda step: True, branches={t: caching(t) for t in range(1, steps)}, ends=ends)
        else:
            everywhere = self._run(lambda step: True)
            ends = {t: self._run(caching(t)) for t in range(1, steps)}
        lambdas = torch.zeros(steps, dtype=torch.float64, device=self._scores.device)
        for t in range(1, steps):
            # under progressive, ends[t] caches before t only, so the run that caches up to t is the next one
            other = ends.get(t + 1, everywhere) if method == "progressive" else everywhere
            lambdas[t] = (other.double() - ends[t].double()).square().mean()
        return lambdas

    def _run(
        self,
        caches_at: Callable[[int], bool],
        *,
        branches: Mapping[int, Callable[[int], bool]] | None = None,
        ends: dict[int, Tensor] | None = None,
        recorded: Recorded | None = None,
        caches: Caches | None = None,
    ) -> Tensor:
        """Final latents of a run that caches at the steps for which `caches_at` is true.

        Args:
            caches_at: whether a step caches; the first step never does.
            branches: before step t, a second run branches off and continues to its end, caching as in `branches[t]`.
            ends: receives the final latents of the branches.
            recorded: predictions of the steps before this run branched off from another; they are not recomputed.
            caches: the caches of the other run at that point.
        """
        record: Recorded = {}
        held: Caches = dict(caches or {})
        branched = 0

        def denoise(call: DenoiserCall) -> Any:
            nonlocal branched
            if recorded is not None and (call.step, call.stream) in recorded:
                return cloned(recorded[call.step, call.stream])
            if branches is not None and ends is not None and call.step > branched:
                branched = call.step
                ends[branched] = self._run(branches[branched], recorded=dict(record), caches=held)
            output, held[call.stream] = self._forward(call, held, caches_at(call.step))
            if branches is not None:
                record[call.step, call.stream] = cloned(output)
            return output

        return self._loop.run(self._inputs, self._generators(), denoise)

    def _forward(self, call: DenoiserCall, held: Caches, caches: bool) -> tuple[Any, Cache]:
        """The denoiser's output and the cache after it: uncached, or with sites blended where the step `caches`."""
        with self._precision():
            if call.stream not in held or not caches:
                return self._cached.compute(call.forward)
            row, computes = self._scores[call.step], self._computes[call.step].tolist()
            return self._cached.blend(call.forward, row, computes, held[call.stream], self._holds)


def _leave_one_out(step: int) -> Callable[[int], bool]:
    return lambda other: other != step


def _progressive(step: int) -> Callable[[int], bool]:
    return lambda other: other < step
