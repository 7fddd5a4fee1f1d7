"""Which nodes of a traced graph are a site's, and what a site may not be."""

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
    """Site index by module path, under every path that a module in several places has."""
    by_module = {id(model.get_submodule(site)): index for index, site in enumerate(sites)}
    modules = model.named_modules(remove_duplicate=False)
    return {path: by_module[id(module)] for path, module in modules if id(module) in by_module}


def find_site_outputs(
    graph: fx.Graph, sites: Sequence[str], index_of: Callable[[str], int | None]
) -> tuple[tuple[fx.Node, ...], ...]:
    """For each site the nodes inside it whose values are used outside it (or are returned).

    Args:
        graph: a functional graph, identities removed.
        sites: site paths.
        index_of: the site that a module path, as it stands in `nn_module_stack`, is of; None for none.

    Raises:
        CaptureError: no site does anything, or one lies in a nested region.
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
            f"{len(idle)} sites lie in a nested region ({nested[0].target}), as autocast within the model makes one"
        )
        raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail, node=nested[0].name))
    if len(idle) == len(sites):
        raise CaptureError(CaptureFailure(Obstacle.SITE, f"none of the {len(sites)} sites does anything in this call"))
    if idle:
        # Skip-layer guidance leaves whole blocks out of some calls, so this is no error.
        log.warning("%d of %d sites do nothing in this call, the first is %s", len(idle), len(sites), idle[0])
    return tuple(tuple(dict.fromkeys(nodes)) for nodes in outputs)


def _tensor_values(node: fx.Node) -> list[fx.Node]:
    """The node itself, or for one that yields a tuple of tensors (`split`) the nodes that pick from it."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    return [user for user in node.users if user.target is operator.getitem]


def site_of(node: fx.Node, index_of: Callable[[str], int | None]) -> int | None:
    """The site that a node lies in."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        index = index_of(path)
        if index is not None:
            return index
    return None


@functools.lru_cache(maxsize=65536)
def without_call_suffix(path: str) -> str:
    """`blocks.0.attn@1` marks the second call of a module that runs twice in one forward."""
    return re.sub(r"@\d+", "", path)


def check_site_result(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """A forward hook: a site that hands one of its inputs on unchanged cannot be replaced by what it gave before.

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
    """Raise CaptureError where memory or FLOPs cannot be known: a size that depends on values, in a site or a product.

    Elsewhere such a size does no harm: it never reaches a slot.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if not _depends_on_values(value):
            continue
        if site_of(node, lambda path: columns.get(without_call_suffix(path))) is not None or _is_product(node):
            raise CaptureError(_unknown_size(value, node=node.name, stack=node.meta.get("stack_trace")))


class StopsAtUnknownSizes(TorchFunctionMode):
    """Raises the error of `check_sizes` while the model is traced: what comes after such a size takes long to trace."""

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
