"""A forward of the denoiser in which each site computes, blends with its cache, or reuses its cache.

Only the calls of the site modules are replaced, and only while a forward runs: any model whose sites are modules can
be trained, and its parameters are never changed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from harmonica_rt.changes import Changes
from harmonica_rt.schedule.sites import check_modules, check_sites
from harmonica_training.errors import TrainingError
from harmonica_training.forward_replacement import replace_forward

Forward = Callable[[], Any]
Cache = dict[tuple[int, int], Any]
"""Outputs of sites, keyed by site and by call of the site within one forward (a tied block's sites run several times).

Values are never overwritten, so a shallow copy of the dict is a snapshot.
"""

Treatment = Callable[[tuple[int, int], Forward], Any]
"""Returns a site's output, given (site, call of the site) and the computation of the module."""

CacheHolds = Literal["computed", "blended"]


class CachedForward:
    """Runs forwards of `model` with caching.

    Args:
        model: the denoiser.
        sites: its sites.
        checkpointing: keep no activations inside the blocks that hold sites, and recompute them for the gradient.

    Raises:
        SiteError: `model` lacks a site.
        TrainingError: `checkpointing` is set, and a site is a child of `model` itself.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], *, checkpointing: bool = False) -> None:
        check_modules(sites, "training")
        check_sites(model, sites)
        self.sites = tuple(sites)
        self._modules = [model.get_submodule(site) for site in sites]
        self._blocks: dict[nn.Module, list[int]] = {}
        if checkpointing:
            for index, site in enumerate(sites):
                block = model.get_submodule(site.rpartition(".")[0])
                self._blocks.setdefault(block, []).append(index)
            if model in self._blocks:
                raise TrainingError("checkpointing works block by block; a site that is a child of the model has none")

    def compute(self, forward: Forward) -> tuple[Any, Cache]:
        """Compute every site; returns the output of the model and the outputs of the sites."""
        cache: Cache = {}

        def treat(place: tuple[int, int], compute: Forward) -> Any:
            output = compute()
            cache[place] = cloned(output)
            return output

        changes = Changes()
        with changes, changes:
            self._treat(treat, changes)
            return forward(), cache

    def blend(
        self, forward: Forward, scores: Tensor, computes: Sequence[bool], cache: Cache, holds: CacheHolds
    ) -> tuple[Any, Cache]:
        """Let site `i` return `r * computed + (1 - r) * cached` with `r = scores[i]` (arXiv 2410.01723, SDT).

        Args:
            forward: runs the model.
            scores: `[sites]` in 0 ... 1; gradients flow into it.
            computes: for each site, whether its cache takes the new output.
            cache: the previous outputs of the sites.
            holds: whether a cache takes the computed output (what it will hold once the schedule is static) or the
                blended one (as in the released code).

        Returns:
            the model's output, and the cache after it, without gradients.
        """
        after = dict(cache)

        def treat(place: tuple[int, int], compute: Forward) -> Any:
            computed = compute()
            if place not in cache:
                raise TrainingError(
                    f"site {self.sites[place[0]]} runs more often than in the step before, so it has no cached output; "
                    f"choose sites that run equally often in every step"
                )
            blended = _lerp(cache[place], computed, scores[place[0]])
            if computes[place[0]]:
                after[place] = cloned(blended) if holds == "blended" else detached(computed)
            return blended

        changes = Changes()
        with changes, changes:
            if self._blocks:
                self._treat_checkpointed(treat, cache, changes)
            else:
                self._treat(treat, changes)
            return forward(), after

    def reuse(self, forward: Forward, computes: Sequence[bool], cache: Cache) -> tuple[Any, Cache]:
        """Compute each site, or skip it and return its cache; returns the model's output and the cache after it."""
        after = dict(cache)

        def treat(place: tuple[int, int], compute: Forward) -> Any:
            if not computes[place[0]]:
                return cloned(cache[place])
            output = compute()
            after[place] = cloned(output)
            return output

        changes = Changes()
        with changes, changes:
            self._treat(treat, changes)
            return forward(), after

    def _treat(self, treat: Treatment, changes: Changes, indices: Sequence[int] | None = None) -> None:
        """Let `treat` handle the calls of sites until `changes` are undone."""
        for index in range(len(self._modules)) if indices is None else indices:
            module, calls = self._modules[index], itertools.count()
            replace_forward(module, functools.partial(_treated, treat, index, calls, module.forward), changes)

    def _treat_checkpointed(self, treat: Treatment, cache: Cache, changes: Changes) -> None:
        """Run each block under a checkpoint, which applies the treatment of its sites again when it is recomputed."""
        if any(call > 0 for _, call in cache):
            raise TrainingError("blocks that run several times in a forward cannot be checkpointed")
        for block, indices in self._blocks.items():
            replace_forward(block, self._checkpoint(block.forward, treat, indices), changes)

    def _checkpoint(self, forward: Callable[..., Any], treat: Treatment, indices: list[int]) -> Callable[..., Any]:
        def treated(*args: Any, **kwargs: Any) -> Any:
            changes = Changes()
            with changes, changes:
                self._treat(treat, changes, indices)
                return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(treated, *args, use_reentrant=False, **kwargs)

        return run


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which `model` is in eval mode and none of its parameters requires a gradient."""
    changes = Changes()
    with changes, changes:
        for module in model.modules():
            changes.undone_by(functools.partial(setattr, module, "training", module.training))
        for parameter in model.parameters():
            if parameter.requires_grad:
                changes.undone_by(functools.partial(parameter.requires_grad_, True))
                parameter.requires_grad_(False)
        model.eval()
        yield


def first_tensor(output: Any) -> Tensor:
    """The prediction in a denoiser's output: its first tensor."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise TrainingError(f"the denoiser returned no tensor, but a {type(output).__name__}")


def _treated(
    treat: Treatment, index: int, calls: Iterator[int], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return treat((index, next(calls)), functools.partial(forward, *args, **kwargs))


def _lerp(cached: Any, computed: Any, weight: Tensor) -> Any:
    def blend(new: Any, old: Any) -> Any:
        if not isinstance(new, Tensor) or not new.is_floating_point():
            return new
        return torch.lerp(old.to(new.dtype), new, weight.to(new.dtype))

    return pytree.tree_map(blend, computed, cached)


def cloned(output: Any) -> Any:
    """A copy of a site's or a model's output, without gradients."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), output)


def detached(output: Any) -> Any:
    """The same output without gradients."""
    return pytree.tree_map_only(Tensor, Tensor.detach, output)
