"""What a run under a schedule must give: the plain model, run eagerly, with site outputs replaced by forward hooks.

The rule. A call of the denoiser belongs to a stream: the calls of one run, one per step, that have the same arguments
(tree, shapes, strides, dtypes, plain values), the same conditioning values and the same state of the model, the k-th
such call of a step to the k-th stream. Where the schedule reuses sites in a step, the stream's stored outputs stand in
for them, provided that the stream stored each of them in the step that the schedule names, or later. Otherwise the call
is computed in full, and everything that it computes is stored.

This file imports nothing of the package but the schedule's own tables, and those only through attributes.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

# What changes from step to step in every family here; "0" is the first positional argument. The rest is conditioning.
VARYING = frozenset({"0", "hidden_states", "timestep"})


class Oracle:
    """Runs the calls of a plain model under a schedule.

    Args:
        schedule: anything with `sites` and a bool array `compute` [steps, sites].
        state: tells the state that the model is in, as a value that is equal for equal states.

    Attributes:
        rounds_otherwise: move each number that the model returns by a unit in the last place.
        in_full: how many calls of each step are computed in full whatever the schedule says, the first ones.
    """

    def __init__(self, schedule: Any, state: Callable[[], Hashable]) -> None:
        self._sites: tuple[str, ...] = tuple(schedule.sites)
        self._compute: list[list[bool]] = schedule.compute.tolist()
        self._state = state
        self._aside = self.rounds_otherwise = False
        self.in_full: Counter[int] = Counter()
        self.begin()

    def begin(self, first: int = 0) -> None:
        """A run begins, with this step of the schedule."""
        self.step = first
        self.calls = self.reused = 0
        self.computed_in_full: list[int] = []
        self._streams: dict[Hashable, dict[str, tuple[int, Any]]] = {}  # stream -> site -> (step, output)
        self._calls_in_step: Counter[Hashable] = Counter()

    def advance(self) -> None:
        """The step is over."""
        self.step += 1
        self._calls_in_step.clear()

    def calls_in_step(self) -> int:
        """Calls of the step at hand so far."""
        return sum(self._calls_in_step.values())

    @contextmanager
    def watching(self, model: torch.nn.Module, *, call_is_step: bool = False) -> Iterator[None]:
        """Within this block every call of `model` goes by the schedule; with `call_is_step` each call is a step."""
        handles: list[Any] = []

        def begins(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if self._aside:
                return
            held, reused = self._next_call(args, kwargs)
            for site in self._sites:  # looked up anew, since modules may have been replaced
                hook = functools.partial(self._site_ran, site, held, reused)
                handles.append(model.get_submodule(site).register_forward_hook(hook))

        def ends(_: Any, __: Any, output: Any) -> Any:
            while handles:
                handles.pop().remove()
            if self._aside or output is None:  # None where the call failed
                return None
            if call_is_step:
                self.advance()
            return pytree.tree_map_only(torch.Tensor, _rounded_otherwise, output) if self.rounds_otherwise else None

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
        """Within this block calls are the plain model's, and none of the run's."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @contextmanager
    def counting(self, scheduler: Any) -> Iterator[None]:
        """Within this block a step is over when `scheduler.step` returns."""
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

    def _next_call(self, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, tuple[int, Any]], frozenset[str]]:
        """What the stream of this call holds, and the sites that the call reuses."""
        key = (self._state(), _identity(args, kwargs))
        stream = (key, self._calls_in_step[key])
        self._calls_in_step[key] += 1
        held = self._streams.setdefault(stream, {})
        wanted = {site for column, site in enumerate(self._sites) if not self._compute[self.step][column]}
        forced = self.calls_in_step() <= self.in_full[self.step]
        fresh = not forced and all(site in held and held[site][0] >= self._source(site) for site in wanted)
        self.calls += 1
        if not fresh:
            self.computed_in_full.append(self.step)
            return held, frozenset()
        self.reused += len(wanted)
        return held, frozenset(wanted)

    def _source(self, site: str) -> int:
        """The step whose value the schedule wants for a site that it reuses in this step."""
        column = self._sites.index(site)
        return max(step for step in range(self.step) if self._compute[step][column])

    def _site_ran(
        self, site: str, held: dict[str, tuple[int, Any]], reused: frozenset[str], _: Any, args: Any, output: Any
    ) -> Any:
        if site in reused:
            return _cloned(held[site][1])
        held[site] = (self.step, _cloned(output))
        return None


def _identity(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What tells the calls of one stream from those of another."""
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


def _rounded_otherwise(output: torch.Tensor) -> torch.Tensor:
    """Each number one unit in the last place up or down, at random; torch's own state of randomness is left alone."""
    up = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    ways = torch.where(up, torch.inf, -torch.inf).to(output.dtype)
    return torch.nextafter(output, ways)


def _cloned(output: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, output)
