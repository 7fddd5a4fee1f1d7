"""Which nodes of a traced graph belong to a site, and which modules cannot be sites."""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle

log = logging.getLogger(__name__)

_PRODUCTS = frozenset(
    (
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum"),
        *("scaled_dot_product_attention", "convolution", "conv1d", "conv2d", "conv3d"),
    )
)


def site_columns(model: nn.Module, sites: Sequence[str]) -> dict[str, int]:
    """Module path -> site index (column of the schedule); a module in several places is listed under each path."""
    by_module = {id(model.get_submodule(site)): index for index, site in enumerate(sites)}
    modules = model.named_modules(remove_duplicate=False)
    return {path: by_module[id(module)] for path, module in modules if id(module) in by_module}


def find_site_outputs(
    graph: fx.Graph, sites: Sequence[str], index_of: Callable[[str], int | None]
) -> tuple[tuple[fx.Node, ...], ...]:
    """For each site, the nodes inside it whose values are used outside it (or are returned).

    Args:
        graph: a functional graph with identities removed.
        sites: site paths.
        index_of: maps a module path, as written in `nn_module_stack`, to the index of its site, or to None.

    Raises:
        CaptureError: no site has outputs in this graph, or some have none and the graph has nested graphs.
    """
    inside: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            site = site_of(node, index_of)
            if site is not None:
                inside[node] = site
    outputs: list[list[fx.Node]] = [[] for _ in sites]
    for node, site in inside.items():
        if any(inside.get(user) != site for user in node.users):
            outputs[site].extend(_tensor_values(node))
    idle = [site for site, nodes in zip(sites, outputs, strict=True) if not nodes]
    nested = [node for node in graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    if idle and nested:
        detail = (
            f"{len(idle)} sites lie in a nested graph ({nested[0].target}), such as autocast inside the model creates"
        )
        raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail, node=nested[0].name))
    if len(idle) == len(sites):
        raise CaptureError(CaptureFailure(Obstacle.SITE, f"none of the {len(sites)} sites does anything in this call"))
    if idle:
        # Skip-layer guidance leaves whole blocks out of some calls, so this is not an error.
        log.warning("%d of %d sites do nothing in this call; the first is %s", len(idle), len(sites), idle[0])
    return tuple(tuple(dict.fromkeys(nodes)) for nodes in outputs)


def _tensor_values(node: fx.Node) -> list[fx.Node]:
    """The node itself, or, if it yields a tuple of tensors (`split`), the nodes that pick items from it."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    return [user for user in node.users if user.target is operator.getitem]


def site_of(node: fx.Node, index_of: Callable[[str], int | None]) -> int | None:
    """The index of the site that a node lies in; None if it lies in none."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        index = index_of(path)
        if index is not None:
            return index
    return None


@functools.lru_cache(maxsize=65536)
def without_call_suffix(path: str) -> str:
    """A module path without `@1` and the like: `blocks.0.attn@1` marks the second call of a module in one forward."""
    return re.sub(r"@\d+", "", path)


def check_site_result(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """A forward hook that refuses a site that returns one of its inputs: an earlier output cannot replace that input.

    Raises:
        CaptureError: with Obstacle.SITE.
    """
    inputs = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    if any(id(leaf) in inputs for leaf in pytree.tree_leaves(output)):
        raise CaptureError(
            CaptureFailure(
                Obstacle.SITE,
                "it returns one of its inputs unchanged; choose a site inside it",
                node=type(module).__name__,
            )
        )


def check_sizes(graph: fx.Graph, columns: Mapping[str, int]) -> None:
    """Raise CaptureError if a value in a site, or the result of a product, has a data-dependent size.

    Its memory or FLOPs cannot be known. Elsewhere such a size does no harm: it never reaches a slot.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if not _depends_on_values(value):
            continue
        if site_of(node, lambda path: columns.get(without_call_suffix(path))) is not None or _is_product(node):
            raise CaptureError(_unknown_size(value, node=node.name, stack=node.meta.get("stack_trace")))


class StopsAtUnknownSizes(TorchFunctionMode):
    """Raises the error of `check_sizes` as soon as the trace meets such a size: tracing on past it takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").strip("_") in _PRODUCTS and _depends_on_values(result):
            raise CaptureError(_unknown_size(result))
        return result


def _depends_on_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape)


def _unknown_size(value: torch.Tensor, **place: str | None) -> CaptureFailure:
    shape = "x".join(map(str, value.shape))
    return CaptureFailure(Obstacle.EXPORT, f"the size {shape} depends on values (a data-dependent expression)", **place)


def _is_product(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.removeprefix("aten::") in _PRODUCTS
