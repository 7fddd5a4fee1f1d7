"""Trace a model into one graph with every site marked.

Hazards, before the mechanism: a graph that deep-copied the weights would double the memory and miss later updates, so
weights are placeholders here and are fetched from the model when a run starts. A graph with in-place operations could
overwrite a cache slot, or lose the operation to dead-code elimination, so one is functionalised (only where it has any:
the retrace costs more than the capture). And a site is cut where its values leave the module: reading
`nn_module_stack`, every value made inside whose users lie outside.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from harmonica_rt.capture.call import Call
from harmonica_rt.capture.export import attributes_kept, export_functional, identities
from harmonica_rt.capture.forward import only_own_forward
from harmonica_rt.capture.inference import check_draws_nothing
from harmonica_rt.capture.reads import Reading, RequestReads, reads_of
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.capture.roles import roles
from harmonica_rt.capture.snapshot import check_capturable
from harmonica_rt.indices import SiteIndex

log = logging.getLogger(__name__)

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum"),
        *("scaled_dot_product_attention", "convolution", "conv1d", "conv2d", "conv3d"),
    )
)


@dataclass(frozen=True)
class CapturedGraph:
    """The model as one functional graph.

    Attributes:
        graph: placeholders are weights, constants and input leaves; its output node holds a flat tuple.
        root: module that `get_attr` nodes of the graph refer to.
        weights: placeholder name -> dotted name of the parameter or buffer in the model.
        constants: placeholder name -> tensor made while tracing.
        inputs: placeholder name -> index among the call's leaves.
        out_spec: how the flat outputs become the model's own return type.
        sites: site paths, as in the schedule.
        site_outputs: for each site its output nodes, in graph order; none for a site that does not run in this call.
        seconds: wall time the capture took.
        reads: values of the request that the graph was made for; None where it holds for all.
    """

    graph: fx.Graph
    root: nn.Module
    weights: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]
    out_spec: pytree.TreeSpec
    sites: tuple[str, ...]
    site_outputs: tuple[tuple[fx.Node, ...], ...]
    seconds: float
    reads: RequestReads | None = None

    @functools.cached_property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def outputs_of(self, site: SiteIndex) -> tuple[fx.Node, ...]:
        """Output nodes of one site."""
        return self.site_outputs[site]


def capture(model: nn.Module, call: Call, sites: Sequence[str]) -> CapturedGraph:
    """Capture `model` for calls with the signature of `call`, with `sites` marked.

    Raises:
        CaptureError: the model cannot be captured; `failure` names the obstacle and where it lies.
    """
    check_capturable(model)
    started = time.perf_counter()
    program, values = _export(model, call, sites)
    check_draws_nothing(program.graph, model)
    weights, constants, inputs = placeholders(program, len(call.leaves))
    out_spec, reads = program.call_spec.out_spec, None
    if values is not None:
        out_spec = out_spec.child(0)
        read = _drop_outputs(program.graph, len(values))
        reads = reads_of(program, read, values, inputs, constants, roles(call))
        program.graph.eliminate_dead_code()
    columns = site_columns(model, sites)
    return CapturedGraph(
        graph=program.graph,
        root=program.graph_module,
        weights=weights,
        constants=constants,
        inputs=inputs,
        out_spec=out_spec,
        sites=tuple(sites),
        site_outputs=find_site_outputs(program.graph, sites, lambda path: columns.get(_without_call_suffix(path))),
        seconds=time.perf_counter() - started,
        reads=reads,
    )


def _export(
    model: nn.Module, call: Call, sites: Sequence[str]
) -> tuple[torch.export.ExportedProgram, list[torch.Tensor] | None]:
    """The traced model; and where its outputs are its own and, beside them, what it read: the values of that.

    A model that cannot be traced may be once it has run: it then has made the tables that it makes at its first call,
    and what it reads is known.
    """
    hooks = [model.get_submodule(site).register_forward_hook(check_site_result, with_kwargs=True) for site in sites]
    try:
        with only_own_forward(model):
            try:
                with attributes_kept(model):
                    program = export_functional(model, (), call.kwargs)
                check_sizes(program.graph, site_columns(model, sites))
                return program, None
            except CaptureError as error:
                if error.failure.obstacle is not Obstacle.EXPORT or _has_no_values(model, call):
                    raise
                before = identities(model)
                values = _values_read(model, call)
                if not values and identities(model) == before:
                    raise
            with attributes_kept(model):
                model.forward = _that_reads(model.forward, Reading(values))
                program = export_functional(model, (), call.kwargs)
            check_sizes(program.graph, site_columns(model, sites))
            return program, values
    finally:
        for hook in hooks:
            hook.remove()


def check_sizes(graph: fx.Graph, columns: Mapping[str, int]) -> None:
    """Raise CaptureError where memory or FLOPs cannot be known: a size that depends on values, in a site or a product.

    Elsewhere such a size does no harm: it never reaches a slot.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or all(isinstance(size, int) for size in value.shape):
            continue
        if site_of(node, lambda path: columns.get(_without_call_suffix(path))) is not None or _is_product(node):
            shape = "x".join(map(str, value.shape))
            detail = f"the size {shape} depends on values (a data-dependent expression)"
            raise CaptureError(
                CaptureFailure(Obstacle.EXPORT, detail, node=node.name, stack=node.meta.get("stack_trace"))
            )


def _is_product(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket._qualified_op_name in _PRODUCTS


def _has_no_values(model: nn.Module, call: Call) -> bool:
    tensors = (*model.parameters(), *(leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)))
    return any(tensor.device.type == "meta" for tensor in tensors)


def _values_read(model: nn.Module, call: Call) -> list[torch.Tensor]:
    """What the model reads of tensors in this call, found by running it."""
    with torch.no_grad(), Reading() as reading:
        model(**call.kwargs)
    return reading.values


def _that_reads(forward: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
    """`forward`, its reads answered and returned beside its result."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with reading:
            output = forward(*args, **kwargs)
        return output, reading.all_tensors()

    return run


def _drop_outputs(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Take the last `count` outputs from a graph."""
    output = graph.output_node()
    flat: Any = output.args[0]
    kept = len(flat) - count
    output.args = (flat[:kept],)
    return list(flat[kept:])


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


def placeholders(
    program: torch.export.ExportedProgram, leaves: int
) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, int]]:
    """What each placeholder stands for: weights by name, constants, and the `leaves` user inputs by index."""
    weights: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: dict[str, int] = {}
    leaf = 0
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                inputs[spec.arg.name] = leaf
            leaf += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            weights[spec.arg.name] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None:
            constants[spec.arg.name] = program.constants[spec.target]
        else:
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, f"the graph takes an input of kind {spec.kind.name}"))
    if leaf != leaves:
        raise CaptureError(CaptureFailure(Obstacle.EXPORT, f"the graph takes {leaf} inputs, the call has {leaves}"))
    return weights, constants, inputs


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
def _without_call_suffix(path: str) -> str:
    """`blocks.0.attn@1` marks the second call of a module that runs twice in one forward."""
    return re.sub(r"@\d+", "", path)
