"""What stands in for the calls of sites while the reference runs: recorded where computed, replaced where reused.

The values of a site in one forward are a list: what each of its calls returned, or, for a span, the residuals of each
call of a block. Values are cloned when they are kept and when they are returned, in case the model writes to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.capture.sites import returns_an_input, unchanged_input
from harmonica_rt.changes import Changes, in_this_thread
from harmonica_rt.errors import SiteError
from harmonica_rt.indices import SiteIndex
from harmonica_rt.reference_engine.spans import BlockShape, SpanForward
from harmonica_rt.schedule.site_names import OUTPUT, span_of

TOO_OFTEN = "a site ran more often in this forward than in the one that stored its outputs"


def replace_sites(
    model: nn.Module,
    sites: tuple[str, ...],
    given: dict[SiteIndex, list[Any]],
    fresh: dict[SiteIndex, list[Any]],
    shapes: dict[SiteIndex, list[BlockShape]],
    changes: Changes,
) -> None:
    """Until `changes` are undone, calls of reused sites return what is `given`, and those of others go to `fresh`.

    Args:
        model: the model.
        sites: names of the sites.
        given: values of the reused sites.
        fresh: is filled with the values of the other sites.
        shapes: what the blocks of spans return; it is filled when a span is computed, and read when it is reused.
        changes: what is undone afterwards.
    """
    for index, name in enumerate(sites):
        site = SiteIndex(index)
        if name == OUTPUT:
            continue  # the stream replaces the call of the model itself
        span = span_of(name)
        if span is not None:
            known = shapes.setdefault(site, [])
            values = given[site] if site in given else fresh.setdefault(site, [])
            forward = SpanForward(name, values, known, reused=site in given)
            for block in dict.fromkeys(map(model.get_submodule, span.blocks)):  # a block may be in several places
                _replace_call(block, _Block(forward, _plain_call(block)), changes)
            continue
        module = model.get_submodule(name)
        call: Callable[..., Any]
        if site in given:
            call = _Reused(given[site])
        else:
            call = _Recorded(name, fresh.setdefault(site, []), _plain_call(module))
        _replace_call(module, call, changes)


def _plain_call(module: nn.Module) -> Callable[..., Any]:
    """Torch runs a module's `_compiled_call_impl`, if it has one, in place of its hooks and its forward."""
    call: Callable[..., Any] = module.__dict__.get("_compiled_call_impl") or module._call_impl
    return call


def _replace_call(module: nn.Module, call: Callable[..., Any], changes: Changes) -> None:
    changes.set(module.__dict__, "_compiled_call_impl", in_this_thread(call, _plain_call(module)))


class _Block:
    """Stands in for a call of a block of a span."""

    def __init__(self, forward: SpanForward, call: Callable[..., Any]) -> None:
        self._forward = forward
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward.call(self._call, args, kwargs)


class _Reused:
    """Stands in for a site's call: the k-th call in a forward returns the k-th cached output."""

    def __init__(self, outputs: list[Any]) -> None:
        self._outputs = iter(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for output in self._outputs:
            return cloned(output)
        raise SiteError(TOO_OFTEN)


class _Recorded:
    """Runs a site and keeps a copy of what it returns."""

    def __init__(self, name: str, kept: list[Any], call: Callable[..., Any]) -> None:
        self._name = name
        self._call = call
        self._kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._call(*args, **kwargs)
        if returns_an_input(args, kwargs, output):
            raise unchanged_input(self._name)
        self._kept.append(cloned(output))
        return output


def cloned(output: Any) -> Any:
    """A copy of what a module returned."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, output)
