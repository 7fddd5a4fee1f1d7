"""SmoothCache (Liu et al., arXiv 2411.10510): reuse while a site's output has changed little in uncached runs.

Hazard: this measures how far apart the outputs of one site lie on the uncached trajectory. It shows neither what reuse
does to the image nor how the errors of sites and steps add up. A threshold turns the measurements into a schedule.

The released code reuses up to the farthest step within the threshold, even if a step before it is not, and always
computes the last step. Here, as in the paper, each reused entry is within the threshold.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from harmonica_rt.errors import ScheduleMismatchError
from harmonica_rt.schedule import MadeBy, Schedule
from harmonica_rt.schedule.producers import site_kind
from harmonica_training.baselines.rules import nearest
from harmonica_training.cached_forward import Cache, CachedForward, frozen
from harmonica_training.costs import SiteCosts
from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop, StreamKey
from harmonica_training.errors import TrainingError
from harmonica_training.sdt import Precision, wide

By = Literal["kind", "site"]
"""Whether all sites of a kind (`attn1`, `ff`, ...) reuse together, as published, or each site by itself."""

Batch = tuple[Mapping[str, Any], Sequence[torch.Generator]]
_Outputs = dict[int, list[Tensor]]  # by site that ran: the output tensors of all its calls in the forward


@dataclass(frozen=True, eq=False)
class SmoothCacheErrors:
    """How much the sites' outputs change from step to step in uncached runs.

    Attributes:
        errors: `[lookahead, steps, sites]`; `errors[j - 1, s, i]` is `|new - old|_1 / |new|_1` of site i's outputs at
            step s (new) and s - j (old), NaN where there is nothing to compare.
        sites: dotted module paths.
        hyper_parameters: how it was measured, for the provenance of schedules.

    Raises:
        ValueError: `errors` has another number of dimensions or sites.
    """

    errors: NDArray[np.float64]
    sites: tuple[str, ...]
    hyper_parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.errors.ndim != 3 or self.errors.shape[2] != len(self.sites):
            raise ValueError(f"expected errors [lookahead, steps, {len(self.sites)}], got {list(self.errors.shape)}")

    @property
    def steps(self) -> int:
        """Number of steps (NFE)."""
        return int(self.errors.shape[1])

    def schedule(self, threshold: float, by: By = "kind") -> Schedule:
        """A site that was computed at step c is reused from c + 1 on while its error against c is below the threshold.

        At most `lookahead` steps in a row are reused.

        Args:
            threshold: limit of the relative error; at 0 or below nothing is reused.
            by: decide per kind of site, by the mean error of its sites, or per site.
        """
        grouped, group_of = self._grouped(by)
        return self._schedule(_mask(grouped, threshold)[:, group_of], threshold, by)

    def at_speedup(self, costs: SiteCosts, speedup: float, by: By = "kind") -> Schedule:
        """The schedule of the threshold that comes nearest to a theoretical speed-up.

        Args:
            costs: the costs of the same sites.
            speedup: theoretical speed-up, at least 1.
            by: see `schedule`.

        Raises:
            ScheduleMismatchError: `costs` has other sites.
            TrainingError: no threshold reaches the speed-up; a longer lookahead may.
        """
        if tuple(costs.sites) != self.sites:
            raise ScheduleMismatchError(
                "expected costs of the sites that the errors were measured for; count them for the same sites"
            )
        grouped, group_of = self._grouped(by)
        known = np.unique(grouped[np.isfinite(grouped)])
        # A schedule changes only where the threshold passes an error; above the largest, all that was seen is reused.
        thresholds = [*known.tolist(), math.nextafter(known[-1], math.inf)] if len(known) else [0.0]

        def mask(index: int) -> NDArray[np.bool_]:
            return _mask(grouped, thresholds[index])[:, group_of]

        best, reached = nearest(len(thresholds), lambda index: costs.speedup(mask(index)), speedup)
        return self._schedule(mask(best), thresholds[best], by, target_speedup=speedup, speedup=reached)

    def _grouped(self, by: By) -> tuple[NDArray[np.float64], list[int]]:
        """Errors `[lookahead, steps, groups]`, and the group of each site."""
        if by not in ("kind", "site"):
            raise ValueError(f"by: expected 'kind' or 'site', got {by!r}")
        names = [site_kind(site) for site in self.sites] if by == "kind" else list(self.sites)
        groups = list(dict.fromkeys(names))
        members = [[name == group for name in names] for group in groups]
        errors = np.stack([self.errors[:, :, member].mean(axis=2) for member in members], axis=2)
        return errors, [groups.index(name) for name in names]

    def _schedule(self, mask: NDArray[np.bool_], threshold: float, by: By, **reached: float) -> Schedule:
        hyper_parameters = {
            **self.hyper_parameters,
            "lookahead": len(self.errors),
            "threshold": threshold,
            "by": by,
            **reached,
        }
        return Schedule.from_array(mask, self.sites, made_by=MadeBy("smoothcache", hyper_parameters))


def calibrate(
    loop: DenoisingLoop,
    cached: CachedForward,
    batches: Iterable[Batch],
    *,
    lookahead: int = 3,
    precision: Precision = contextlib.nullcontext,
) -> SmoothCacheErrors:
    """Measure the errors in uncached runs of the pipeline, one per batch.

    The norm of a site covers the batch, its output tensors and its calls in a forward; errors are averaged over batches
    and over the calls of the denoiser in a step. The sites' outputs of the last `lookahead` steps are kept in memory.

    Args:
        loop: runs the pipeline's denoising loop.
        cached: runs its denoiser and returns the outputs of its sites.
        batches: inputs of the pipeline's call for B samples, and B generators of their noise.
        lookahead: the most steps between an output and its reuse.
        precision: makes a context for forwards.

    Raises:
        TrainingError: there is no batch, `lookahead` is below 1, or a site's output is not finite.
    """
    if lookahead < 1:
        raise TrainingError(f"lookahead: expected at least 1 step, got {lookahead}")
    changes = _Changes(cached.sites, lookahead)
    samples = 0
    with frozen(loop.denoiser):
        for inputs, generators in batches:

            def denoise(call: DenoiserCall) -> Any:
                with precision():
                    output, cache = cached.compute(call.forward)
                changes.see(call, cache)
                return output

            changes.begin_run()
            loop.run(inputs, generators, denoise)
            samples += len(generators)
    if not samples:
        raise TrainingError("expected one batch or more to calibrate on, got none")
    return SmoothCacheErrors(changes.errors(), cached.sites, {"samples": samples})


class _Changes:
    """Compares what sites return with what they returned in the last `lookahead` steps."""

    def __init__(self, sites: Sequence[str], lookahead: int) -> None:
        self._sites = sites
        self._lookahead = lookahead
        self._steps = 0
        self._found: defaultdict[tuple[int, int, int], list[float]] = defaultdict(list)
        self._past: dict[StreamKey, deque[tuple[int, _Outputs]]] = {}

    def begin_run(self) -> None:
        self._past.clear()

    def see(self, call: DenoiserCall, cache: Cache) -> None:
        self._steps = max(self._steps, call.step + 1)
        past = self._past.setdefault(call.stream, deque(maxlen=self._lookahead))
        new = _by_site(cache)
        for site, tensors in new.items():
            size = _norm(tensors)
            if not math.isfinite(size):
                raise TrainingError(
                    f"the output of site {self._sites[site]} is not finite at step {call.step}; "
                    f"run the pipeline in a wider dtype"
                )
            for step, outputs in past:
                old, distance = outputs.get(site, []), call.step - step
                if distance <= self._lookahead and [t.shape for t in old] == [t.shape for t in tensors]:
                    change = _norm([wide(n) - wide(o) for n, o in zip(tensors, old, strict=True)])
                    self._found[distance - 1, call.step, site].append(_ratio(change, size))
        past.append((call.step, new))

    def errors(self) -> NDArray[np.float64]:
        """Means, `[lookahead, steps, sites]`."""
        errors = np.full((self._lookahead, self._steps, len(self._sites)), np.nan)
        for place, values in self._found.items():
            errors[place] = np.mean(values)
        return errors


def _mask(errors: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """The mask bool `[steps, groups]` of errors `[lookahead, steps, groups]`."""
    lookahead, steps, groups = errors.shape
    mask = np.ones((steps, groups), np.bool_)
    age = np.zeros(groups, np.intp)  # steps since the group computed
    for step in range(1, steps):
        age += 1
        error = errors[np.minimum(age, lookahead) - 1, step, np.arange(groups)]
        mask[step] = (age > lookahead) | ~(error < threshold)  # NaN, where nothing could be compared, computes
        age[mask[step]] = 0
    return mask


def _by_site(cache: Cache) -> _Outputs:
    outputs: _Outputs = {}
    for (site, _), output in cache.items():
        tensors = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        outputs.setdefault(site, []).extend(tensor for tensor in tensors if tensor.is_floating_point())
    return outputs


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(wide(tensor).abs().sum()) for tensor in tensors)


def _ratio(change: float, size: float) -> float:
    if change == 0.0:
        return 0.0
    return change / size if size else math.inf
