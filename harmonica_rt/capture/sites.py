"""Which nodes of a captured graph belong to a site, and which modules cannot be sites."""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harmonica_rt.capture.spans import find_bases
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.schedule.site_names import OUTPUT, span_of

log = logging.getLogger(__name__)

_PRODUCTS = frozenset(
    (
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum"),
        *("scaled_dot_product_attention", "convolution", "conv1d", "conv2d", "conv3d"),
    )
)

_IN_A_LIST = re.compile(r"\.\d+(?:[.@]|$)")


@dataclass(frozen=True)
class SiteMarks:
    """Where the sites of a schedule lie in a graph.

    Attributes:
        outputs: for each site, the nodes whose values leave it, in graph order; empty for a site that does nothing.
        bases: for each output of a span, the node that it is a residual of. The cached value is the difference.
    """

    outputs: tuple[tuple[fx.Node, ...], ...]
    bases: dict[fx.Node, fx.Node]


def site_columns(model: nn.Module, sites: Sequence[str]) -> dict[str, int]:
    """Module path -> site index (column of the schedule); a module in several places is listed under each path."""
    by_module: dict[int, int] = {}
    for index, site in enumerate(sites):
        span = span_of(site)
        for path in span.blocks if span is not None else (site,) if site != OUTPUT else ():
            by_module[id(model.get_submodule(path))] = index
    modules = model.named_modules(remove_duplicate=False)
    return {path: by_module[id(module)] for path, module in modules if id(module) in by_module}


def find_marks(
    graph: fx.Graph, sites: Sequence[str], index_of: Callable[[str], int | None], fixed: Collection[str]
) -> SiteMarks:
    """The outputs of each site: the nodes inside it whose values are used outside it (or are returned).

    Args:
        graph: a functional graph with identities removed.
        sites: names of the sites.
        index_of: maps a module path, as written in `nn_module_stack`, to the index of its site, or to None.
        fixed: names of the placeholders that are parameters or constants.

    Raises:
        CaptureError: no site has outputs in this graph; some have none and the graph has nested graphs; a value in a
            site has a data-dependent size; or an output of a span is no residual.
    """
    inside: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            site = site_of(node, index_of)
            if site is not None:
                inside[node] = site
                _check_size(node)
    outputs: list[list[fx.Node]] = [[] for _ in sites]
    for node, site in inside.items():
        if any(inside.get(user) != site for user in node.users):
            outputs[site].extend(_tensor_values(node))
    if OUTPUT in sites:
        results: Any = graph.output_node().args[0]
        outputs[sites.index(OUTPUT)] = [node for node in results if _is_computed_tensor(node)]
    _check_idle(graph, sites, outputs)
    distinct = tuple(tuple(dict.fromkeys(nodes)) for nodes in outputs)
    spans = {index: distinct[index] for index, site in enumerate(sites) if span_of(site) is not None}
    return SiteMarks(distinct, find_bases(graph, inside, spans, sites, fixed))


def _check_idle(graph: fx.Graph, sites: Sequence[str], outputs: Sequence[Sequence[fx.Node]]) -> None:
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


def _is_computed_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.meta["val"], torch.Tensor)


def _tensor_values(node: fx.Node) -> list[fx.Node]:
    """The node itself, or, if it yields a tuple of tensors (`split`), the nodes that pick items from it."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    return [user for user in node.users if user.target is operator.getitem]


def site_of(node: fx.Node, index_of: Callable[[str], int | None]) -> int | None:
    """The index of the site that a node lies in; None if it lies in none."""
    for path in _module_paths(node):
        index = index_of(path)
        if index is not None:
            return index
    return None


def _module_paths(node: fx.Node) -> Iterator[str]:
    return (path for path, _ in (node.meta.get("nn_module_stack") or {}).values())


@functools.lru_cache(maxsize=65536)
def without_call_suffix(path: str) -> str:
    """A module path without `@1` and the like: `blocks.0.attn@1` marks the second call of a module in one forward."""
    return re.sub(r"@\d+", "", path)


def returns_an_input(args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a module returns one of its inputs unchanged."""
    inputs = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    return any(id(leaf) in inputs for leaf in pytree.tree_leaves(output))


def unchanged_input(name: str) -> CaptureError:
    """The error for a site that returns one of its inputs: an earlier output cannot replace that input."""
    detail = "it returns one of its inputs unchanged; choose a site inside it"
    return CaptureError(CaptureFailure(Obstacle.SITE, detail, node=name))


def check_sizes(graph: fx.Graph) -> None:
    """Raise CaptureError if a value in a block, or the result of a product, has a data-dependent size.

    Its memory or FLOPs cannot be known. Elsewhere such a size does no harm: it never reaches a slot.
    """
    for node in graph.nodes:
        if _is_product(node) or any(_IN_A_LIST.search(path) for path in _module_paths(node)):
            _check_size(node)


def _check_size(node: fx.Node) -> None:
    value: Any = node.meta.get("val")
    if _depends_on_values(value):
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
