"""Counts the cost of each site of a model and the theoretical speed-up of a mask, from the data flow of one forward.

Hazard: reusing a site saves more than the work inside its module. Work that fed only reused sites is saved too: in Flux
single blocks the attention and MLP before `proj_out`, in SD3 a context feed-forward once every attention after it is
reused. Work that is needed elsewhere remains, such as the modulation that gates a reused output. So site costs are not
additive, and no sum over modules gives them. Instead one forward is recorded operator by operator with its data flow,
and the cost of a pattern is the work that its outputs still need. A *cut* is a node of the recording that a site's
output passes through: where the site is reused, the search for needed work stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from harmonica_rt.errors import ScheduleError, ScheduleMismatchError, SiteError
from harmonica_rt.schedule.sites import check_modules, check_sites
from harmonica_training.forward_recording import Recorder, Recording, marked, unfused_attention


class SiteCosts:
    """Costs of one forward. A multiply-add counts as two FLOPs, element-wise operators as zero.

    Attributes:
        sites: site paths, in the order of a mask's columns.
        total: FLOPs that the outputs of one uncached forward need.
        alone: `[sites]`, share of `total` that is saved when only this site is reused, in [0, 1].
    """

    def __init__(self, sites: Sequence[str], recording: Recording) -> None:
        self.sites = tuple(sites)
        self._site_of = tuple(recording.cuts.values())
        self._needs = _needs(recording)
        counted = sorted({node for need in self._needs for node in need.work})
        self._flops = np.array([recording.flops[node] for node in counted], np.int64)
        self._work = np.array([np.isin(counted, list(need.work)) for need in self._needs], bool)
        self._known: dict[tuple[bytes, frozenset[int]], tuple[int, frozenset[int]]] = {}
        self.total = self.left(np.ones(len(self.sites), bool))
        only = [self.left(row) for row in ~np.eye(len(self.sites), dtype=bool)]
        self.alone: NDArray[np.float64] = 1.0 - np.array(only) / self.total if self.total else np.zeros(len(only))

    def left(self, row: ArrayLike) -> int:
        """FLOPs of a forward that computes the sites where `row`, `bool[sites]`, is True.

        The forward is counted alone: a computed site that feeds only reused sites costs nothing here, whereas
        `speedup` counts it if a later step reads its output.

        Raises:
            TypeError: `row` is not boolean.
            ScheduleMismatchError: `row` has a different number of sites.
        """
        return self._forward(self._checked(row, 1), frozenset())[0]

    def speedup(self, mask: ArrayLike) -> float:
        """FLOPs of an uncached run / FLOPs of a run with this `bool[steps, sites]`, at least 1.

        Raises:
            TypeError: `mask` is not boolean.
            ScheduleMismatchError: `mask` has another shape.
            ScheduleError: the first step reuses a site.
        """
        compute = self._checked(mask, 2)
        if not len(compute) or not compute[0].all():
            raise ScheduleError("the first step has nothing to reuse: a mask needs a first row that is all True")
        left = 0
        # Backwards, because the outputs that a step must provide depend on what later steps read.
        wanted: frozenset[int] = frozenset()
        for row in compute[::-1]:
            computed = frozenset(cut for cut in wanted if row[self._site_of[cut]])
            flops, reads = self._forward(row, computed)
            left += flops
            wanted = wanted - computed | reads
        return self.total * len(compute) / left if left else 1.0

    def _forward(self, row: NDArray[np.bool_], stored: frozenset[int]) -> tuple[int, frozenset[int]]:
        """FLOPs of a forward that must produce its outputs and the cuts `stored`, and the cuts that it reads."""
        key = row.tobytes(), stored
        if key not in self._known:
            reached = {len(self._site_of), *stored}  # the last need is that of the outputs
            pending, reads = list(reached), set()
            while pending:
                for cut in self._needs[pending.pop()].reads:
                    if not row[self._site_of[cut]]:
                        reads.add(cut)
                    elif cut not in reached:
                        reached.add(cut)
                        pending.append(cut)
            done = self._work[sorted(reached)].any(axis=0)
            self._known[key] = int(self._flops[done].sum()), frozenset(reads)
        return self._known[key]

    def _checked(self, mask: ArrayLike, dimensions: int) -> NDArray[np.bool_]:
        found = np.asarray(mask)
        if found.dtype != bool:
            raise TypeError(f"a mask is boolean, True where a site computes; this one has dtype {found.dtype}")
        if found.ndim != dimensions or found.shape[-1] != len(self.sites):
            expected = f"[steps, {len(self.sites)}]" if dimensions == 2 else f"[{len(self.sites)}]"
            raise ScheduleMismatchError(f"expected a mask of shape {expected}, got {list(found.shape)}")
        return found


def count_costs(model: nn.Module, sites: Sequence[str], call: Callable[[], object]) -> SiteCosts:
    """Run `call` once, without gradients, and count what each site costs.

    Args:
        model: the denoiser.
        sites: dotted module paths. All calls of a site within the forward are reused together.
        call: runs one forward of `model` and returns its outputs.

    Raises:
        SiteError: the model lacks a site, one site lies inside another, or a site does not run in the forward.
        ValueError: `call` returned no tensor that was computed in it.
    """
    check_modules(sites, "counting the costs of sites")
    check_sites(model, sites)
    recording = Recording()
    recorder = Recorder(recording)
    with marked(model, sites, recorder), unfused_attention(), torch.inference_mode(False), torch.no_grad():
        with recorder:
            outputs = call()
        recording.outputs = recorder.producers(outputs)
    idle = [site for index, site in enumerate(sites) if index not in recording.cuts.values()]
    if idle:
        raise SiteError(
            f"{len(idle)} of {len(sites)} sites give no tensor in this forward of {type(model).__name__} (the first is "
            f"{idle[0]}); choose sites that run in every forward"
        )
    if not recording.outputs:
        raise ValueError("call returned no tensor that it computed; it has to return what the model's forward returns")
    return SiteCosts(sites, recording)


@dataclass(frozen=True)
class _Need:
    """What one output needs, back to the nearest cuts: the nodes that have FLOPs, and the numbers of those cuts."""

    work: frozenset[int]
    reads: frozenset[int]


def _needs(recording: Recording) -> list[_Need]:
    """What each cut needs, followed by what the forward's outputs need."""
    number = {node: cut for cut, node in enumerate(recording.cuts)}
    return [
        _need(recording, number, starts)
        for starts in (*(recording.inputs[node] for node in recording.cuts), recording.outputs)
    ]


def _need(recording: Recording, number: dict[int, int], starts: Iterable[int]) -> _Need:
    """What the nodes `starts` need; `number` gives the number of the cut that a node is."""
    reached = set(starts)
    pending, reads = list(reached), set()
    while pending:
        node = pending.pop()
        if node in number:
            reads.add(number[node])
            continue
        fresh = recording.inputs[node] - reached
        reached |= fresh
        pending.extend(fresh)
    return _Need(frozenset(node for node in reached if recording.flops[node]), frozenset(reads))
