"""The checked content of a schedule: `bool[steps, sites]`, True = compute, False = reuse, and what it was made for.

Hazard: a schedule that is nearly right (a missing site, a row out of order, a first step that reads what no step wrote)
still runs and gives a wrong image. So every schedule is checked when it is made, in whatever way, and is immutable
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import (
    check_compute,
    check_number,
    check_scores_shape,
    check_sites,
    check_timesteps,
)
from harmonica_rt.schedule.producers import site_kind
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo, WeightsBy
from harmonica_rt.schedule.weights import Weights, check_weights, per_entry
from harmonica_rt.untrusted.text import one_line, quoted

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False, repr=False)
class ScheduleData:
    """The checked entries and provenance of a schedule; `Schedule` documents them, and adds ways to make one."""

    compute: NDArray[np.bool_]
    sites: tuple[str, ...]
    model: ModelInfo | None = None
    sampler: SamplerInfo | None = None
    timesteps: tuple[float, ...] | None = None
    guidance: float | None = None
    made_by: MadeBy | None = None
    weights: Weights | None = None
    weights_by: WeightsBy | None = None

    def __post_init__(self) -> None:
        compute, sites = check_compute(self.compute), check_sites(self.sites)
        steps = len(compute)
        if compute.shape[1] != len(sites):
            raise ScheduleError(
                f"compute: expected one column per site, got {compute.shape[1]} columns for {len(sites)} sites"
            )
        if not compute[0].all():
            first = [site for site, computes in zip(sites, compute[0], strict=True) if not computes]
            raise ScheduleError(
                f"compute: step 0 reuses {len(first)} of {len(sites)} sites ({quoted(first[0])} first), but "
                f"nothing is stored before it; make every entry of step 0 compute"
            )
        set_ = object.__setattr__
        set_(self, "compute", _read_only(compute))
        set_(self, "sites", sites)
        kinds = {"model": ModelInfo, "sampler": SamplerInfo, "made_by": MadeBy, "weights_by": WeightsBy}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ScheduleError(f"{field}: expected a {kind.__name__} or None, got {type(value).__name__}")
        self._set_weights()
        if self.timesteps is not None:
            set_(self, "timesteps", check_timesteps(self.timesteps, steps))
        if self.guidance is not None:
            set_(self, "guidance", check_number(self.guidance, "guidance"))
        if self.made_by is not None and self.made_by.scores is not None:
            check_scores_shape(self.made_by.scores, compute.shape)

    def _set_weights(self) -> None:
        """Keep the weights in their simplest form; without any, there is nothing to say of who made them."""
        if self.weights is None:
            if self.weights_by is not None:
                raise ScheduleError("weights_by: says who made the weights, but there are none; leave it out")
            return
        weights = check_weights(self.weights, self.compute, self.sites)
        object.__setattr__(self, "weights", None if weights is None else _read_only(weights))
        if weights is None:
            object.__setattr__(self, "weights_by", None)

    @property
    def steps(self) -> int:
        """Number of steps (NFE)."""
        return int(self.compute.shape[0])

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused entries / all entries, 0 ... 1."""
        return float(1.0 - self.compute.mean())

    def cur_per_step(self) -> NDArray[np.float64]:
        """CUR of each step, `[steps]`."""
        shares: NDArray[np.float64] = self.compute.mean(axis=1, dtype=np.float64)
        return 1.0 - shares

    def cur_per_kind(self) -> dict[str, float]:
        """CUR of each kind of site (`attn1`, `ff`, ...: the last name in its path), in order of first appearance."""
        kinds = [site_kind(site) for site in self.sites]
        return {kind: float(1.0 - self.compute[:, [k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}

    @property
    def patterns(self) -> int:
        """Number of distinct rows, including the all-compute row. A plan may have more: its patterns include stores."""
        return len(np.unique(self.compute, axis=0))

    @property
    def entry_weights(self) -> Weights:
        """The weights of each entry, `float64[steps, sites, order]`, newest value first; 0 where it is computed."""
        return per_entry(self.weights, self.compute)

    @property
    def most_weights(self) -> int:
        """The most weights of an entry, and so the most values of a site that a run keeps; 1 for plain reuse."""
        return 1 if self.weights is None else int(self.weights.shape[-1])

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, ScheduleData) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        # through the constructor, so that copies and unpickled schedules are read-only as well
        weights = None if self.weights is None else np.array(self.weights)
        return type(self), (np.array(self.compute), *self._fields, weights, self.weights_by)

    def __repr__(self) -> str:
        made = f", made by {one_line(self.made_by.method)}" if self.made_by else ""
        weights = f", up to {self.most_weights} weights" if self.weights is not None else ""
        size = f"{self.steps} steps x {len(self.sites)} sites"
        return f"<{type(self).__name__} {size}, CUR {self.cur:.2%}{weights}{made}>"

    @property
    def _fields(self) -> tuple[object, ...]:
        """All but the arrays and what belongs to the weights."""
        return self.sites, self.model, self.sampler, self.timesteps, self.guidance, self.made_by

    def _key(self) -> tuple[object, ...]:
        weights = None if self.weights is None else (self.weights.shape, self.weights.tobytes())
        return (self.compute.shape, self.compute.tobytes(), *self._fields, weights, self.weights_by)


def _read_only(array: NDArray[T]) -> NDArray[T]:
    """A copy over bytes: unlike after `setflags(write=False)`, nobody can make it writable again."""
    return np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)
