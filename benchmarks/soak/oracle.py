"""What a run under a schedule must give: the plain model, run eagerly, with site outputs replaced by forward hooks.

The rule: a call of the denoiser belongs to a stream. A stream holds the calls of one run, one per step, that have equal
arguments (tree, shapes, strides, dtypes, plain values), equal conditioning values and the same state of the model; the
k-th such call of a step belongs to the k-th such stream. Where the schedule reuses sites in a step, the stream's stored
outputs stand in for them, provided that the stream stored each one in the step that the schedule names or later.
Otherwise the call is computed in full, and all its site outputs are stored.

This file imports nothing from the package; it reads the schedule's tables through attributes.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

# Arguments that change from step to step in every family here; "0" is the first positional argument. All others are
# conditioning.
VARYING = frozenset({"0", "hidden_states", "timestep"})


class Stored(NamedTuple):
    """A site's output, and the step that stored it."""

    step: int
    output: Any


Stream = dict[str, Stored]
"""What one stream holds, by site."""


class Counts(NamedTuple):
    """What a run did.

    Attributes:
        calls: number of calls of the denoiser.
        reused: number of reused entries, over all calls.
        in_full: the step of each call that was computed in full because its stream lacked outputs, or on demand.
    """

    calls: int
    reused: int
    in_full: tuple[int, ...]


@dataclass
class Progress:
    """How far a run has come: its step, and what its calls have done and stored."""

    step: int
    calls: int = 0
    reused: int = 0
    in_full: list[int] = field(default_factory=list)
    streams: dict[Hashable, Stream] = field(default_factory=dict)
    calls_in_step: Counter[Hashable] = field(default_factory=Counter)


class Oracle:
    """Runs the calls of a plain model under a schedule.

    Args:
        schedule: anything with `sites` and a bool array `compute` [steps, sites].
        state: returns the model's current state, as a value that is equal for equal states.

    Attributes:
        perturbs_outputs: move each number that the model returns by one unit in the last place.
        forced_in_full: for each step, how many of its first calls are computed in full whatever the schedule says.
    """

    def __init__(self, schedule: Any, state: Callable[[], Hashable]) -> None:
        self._sites: tuple[str, ...] = tuple(schedule.sites)
        self._compute: list[list[bool]] = schedule.compute.tolist()
        self._state = state
        self._aside = self.perturbs_outputs = False
        self.forced_in_full: Counter[int] = Counter()
        self._progress = Progress(0)

    def begin(self, first: int = 0) -> None:
        """Start a run with step `first` of the schedule."""
        self._progress = Progress(first)

    def advance(self) -> None:
        """End the current step."""
        self._progress.step += 1
        self._progress.calls_in_step.clear()

    @property
    def counts(self) -> Counts:
        """What the run has done so far."""
        return Counts(self._progress.calls, self._progress.reused, tuple(self._progress.in_full))

    @contextmanager
    def watching(self, model: torch.nn.Module, *, call_is_step: bool = False) -> Iterator[None]:
        """Within this block every call of `model` follows the schedule; with `call_is_step` each call is a step."""
        handles: list[Any] = []

        def begins(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if self._aside:
                return
            stream, reused = self._next_call(args, kwargs)
            for site in self._sites:  # looked up at each call, since modules may have been replaced
                hook = functools.partial(self._site_ran, site, stream, reused)
                handles.append(model.get_submodule(site).register_forward_hook(hook))

        def ends(_: Any, __: Any, output: Any) -> Any:
            while handles:
                handles.pop().remove()
            if self._aside or output is None:  # None where the call failed
                return None
            if call_is_step:
                self.advance()
            return pytree.tree_map_only(torch.Tensor, _perturbed, output) if self.perturbs_outputs else None

        own = [
            model.register_forward_pre_hook(begins, with_kwargs=True),
            model.register_forward_hook(ends, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in own:
                handle.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this block calls go to the plain model and do not belong to the run."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @contextmanager
    def counting(self, scheduler: Any) -> Iterator[None]:
        """Within this block a step ends when `scheduler.step` returns."""
        original = scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.advance()
            return result

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step

    def _next_call(self, args: Any, kwargs: dict[str, Any]) -> tuple[Stream, frozenset[str]]:
        """The stream that this call belongs to, and the sites that the call reuses."""
        run = self._progress
        key = (self._state(), _identity(args, kwargs))
        stream = run.streams.setdefault((key, run.calls_in_step[key]), {})
        run.calls_in_step[key] += 1
        wanted = {site for column, site in enumerate(self._sites) if not self._compute[run.step][column]}
        forced = sum(run.calls_in_step.values()) <= self.forced_in_full[run.step]
        fresh = not forced and all(site in stream and stream[site].step >= self._source(site) for site in wanted)
        run.calls += 1
        if not fresh:
            run.in_full.append(run.step)
            return stream, frozenset()
        run.reused += len(wanted)
        return stream, frozenset(wanted)

    def _source(self, site: str) -> int:
        """The step whose output the schedule reuses for this site in the current step."""
        column = self._sites.index(site)
        return max(step for step in range(self._progress.step) if self._compute[step][column])

    def _site_ran(self, site: str, stream: Stream, reused: frozenset[str], _: Any, args: Any, output: Any) -> Any:
        if site in reused:
            return _cloned(stream[site].output)
        stream[site] = Stored(self._progress.step, _cloned(output))
        return None


def _identity(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What the calls of one stream have in common, besides the model's state."""
    named = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    return tuple(_argument(name, named[name]) for name in sorted(named))


def _argument(name: str, value: Any) -> Hashable:
    leaves, tree = pytree.tree_flatten(value)
    return (name, str(tree), tuple(_leaf(leaf, by_value=name not in VARYING) for leaf in leaves))


def _leaf(leaf: Any, *, by_value: bool) -> Hashable:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    layout = (tuple(leaf.shape), leaf.stride(), leaf.dtype)
    if not by_value:
        return layout
    return (*layout, hashlib.sha256(leaf.detach().contiguous().numpy().tobytes()).digest())


def _perturbed(output: torch.Tensor) -> torch.Tensor:
    """Move each number up or down by one unit in the last place, at random; torch's global generator is not used."""
    up = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    directions = torch.where(up, torch.inf, -torch.inf).to(output.dtype)
    return torch.nextafter(output, directions)


def _cloned(output: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, output)
