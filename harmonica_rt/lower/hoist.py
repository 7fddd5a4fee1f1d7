"""Hoists values that do not depend on the latents: they are computed before the steps, for all steps at once.

A step graph is cut where values that depend on the latents use values that do not. What remains, the body, takes
those as arguments. The prologue, two parts of the captured graph, computes them: `once` computes what depends only on
parameters and the request; `each` computes, for every step, what depends on the timestep as well. In a DiT this is
nearly half of all nodes (time embeddings, adaLN modulation, text projections, keys and values of cross-attention), and
for a small batch most of the memory traffic, since their parameters are read for one row per sample.

Requires: functional graphs; step graphs of the captured graph (fused or not). Ensures: values stay the same up to
rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx

from harmonica_rt.call.roles import Role
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.graph.facts import needed_nodes, owner
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.lower.equal_values import merged
from harmonica_rt.lower.graph_states import BodyGraph, FusedGraph
from harmonica_rt.lower.joined_products import JoinedTensor
from harmonica_rt.plan.binding_time import Binding, bindings
from harmonica_rt.plan.step_graph import ProgramGraph, StepGraph, TabledGraph

T = TypeVar("T")

LIMIT = 512 * 2**20  # bytes of hoisted values per stream


@dataclass(frozen=True, eq=False)
class Part(TabledGraph):
    """One of the two parts of the prologue: a piece of the captured graph that runs before the steps.

    Placeholders come in the order parameters, constants, inputs, given; the output node holds one flat tuple.

    Attributes:
        given: names of the values that it takes from the other part.
        results: names of its outputs.
    """

    given: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prologue:
    """What is computed before the bodies.

    Attributes:
        names: names of the hoisted values, which are nodes of the captured graph.
        once: computes those that depend only on parameters and the request, and what `each` is given.
        each: computes, for one step, those that depend on its timestep too.
        timesteps: indices of the leaves that are timesteps.
        nbytes: bytes of all hoisted values of one stream over a run of `run_steps` steps; views cost nothing.
        run_steps: as given to `plan_prologue`.
        step_bytes: bytes of those that depend on the timestep, in one step.
        joined: tensors of several parameters each, made once per request; not among the values above.
    """

    names: tuple[str, ...]
    once: Part
    each: Part
    timesteps: tuple[int, ...]
    nbytes: int
    run_steps: int
    step_bytes: int
    joined: tuple[JoinedTensor, ...] = ()

    def for_steps(self, steps: int) -> Prologue:
        """The same for runs of another number of steps."""
        return replace(self, nbytes=self.nbytes + self.step_bytes * (steps - self.run_steps), run_steps=steps)


def plan_prologue(
    captured: CapturedGraph,
    steps: Sequence[StepGraph | FusedGraph],
    roles: Sequence[Role],
    run_steps: int,
    *,
    limit: int = LIMIT,
) -> Prologue:
    """Choose what to hoist out of `steps`.

    Where the values would take more than `limit` bytes, the largest stay in the body, and the values that they are
    computed from are hoisted instead.

    Args:
        captured: the graph that all step graphs come from.
        steps: the distinct step graphs of a run.
        roles: roles of the call's leaves.
        run_steps: number of steps of a run.
        limit: most bytes that the hoisted values of one stream may take.
    """
    bound = bindings_of(captured, roles)
    nodes = {node.name: node for node in captured.graph.nodes}
    held = {*captured.parameters, *captured.constants}  # views of these are free in the body; hoisted, they cost copies
    stay = {
        name
        for name, node in nodes.items()
        if not isinstance(node.meta.get("val"), torch.Tensor) or owner(node).name in held
    }
    while True:
        names = _frontier(steps, {name: bound[node] for name, node in nodes.items()}, stay)
        groups: dict[fx.Node, list[str]] = {}  # by owner: views lie in the memory of one value
        for name in names:
            groups.setdefault(owner(nodes[name]), []).append(name)
        sizes = {node: _nbytes(node) * (run_steps if bound[node] & Binding.TIMESTEP else 1) for node in groups}
        if sum(sizes.values()) <= limit:
            break
        largest = max(sizes, key=sizes.__getitem__)
        stay |= {*groups[largest], largest.name}
    early = [node for node in captured.graph.nodes if not bound[node] & Binding.LATENTS]
    rebuilt = merged(captured.graph, frozenset(early))
    merged_bound = {rebuilt[node]: bound[node] for node in early}
    each, once = (
        {name: rebuilt[nodes[name]] for name in names if bool(bound[nodes[name]] & Binding.TIMESTEP) is timed}
        for timed in (True, False)
    )
    given = _given(each.values(), merged_bound)
    once |= {node.name: node for node in given}
    leaves = [index for index, role in enumerate(roles) if role is Role.TIMESTEP]
    return Prologue(
        names=tuple(names),
        once=_part(captured, rebuilt.graph, once, ()),
        each=_part(captured, rebuilt.graph, each, given),
        timesteps=tuple(index for index in leaves if index in captured.inputs.values()),
        nbytes=sum(sizes.values()),
        run_steps=run_steps,
        step_bytes=sum(_nbytes(node) for node in groups if bound[node] & Binding.TIMESTEP),
    )


def bindings_of(captured: CapturedGraph, roles: Sequence[Role]) -> dict[fx.Node, Binding]:
    """The binding of every node of a captured graph, for calls whose leaves have `roles`."""
    late = {node for nodes in captured.site_outputs for node in nodes}
    return bindings(captured.graph, captured.inputs, roles, {*captured.parameters, *captured.constants}, late)


def cut(step: StepGraph | FusedGraph, names: Collection[str]) -> BodyGraph:
    """The body: `step` with the hoisted values as arguments, and without what only they needed."""
    hoisted: dict[fx.Node, str] = {}
    for node in step.graph.nodes:
        name = _captured_name(node)
        if name is not None and name in names:
            hoisted[node] = name
    results, stored = tuple(step.result_nodes), tuple(step.stored_nodes)
    needed = needed_nodes([*results, *stored], hoisted)
    arguments = step.argument_nodes
    first_read = len(arguments) - len(step.reads)
    live = [node for node in step.graph.nodes if node in needed and node in hoisted]

    rebuilt = Rebuild()
    for node in (*arguments[:first_read], *live, *arguments[first_read:]):
        if node in needed:
            rebuilt.placeholder(node, hoisted.get(node))
    for node in step.graph.nodes:
        if node in needed and node not in rebuilt and node.op != "output":
            rebuilt.copy(node)
    kept = iter([node in needed for node in arguments])
    return step.become(
        BodyGraph,
        graph=rebuilt.finish(rebuilt.new((results, stored))),
        parameters=_kept(step.parameters, kept),
        constants=_kept(step.constants, kept),
        inputs=_kept(step.inputs, kept),
        hoisted=(*_kept(step.hoisted, kept), *(hoisted[node] for node in live)),
        reads=_kept(step.reads, kept),
    )


def _kept(items: tuple[T, ...], keep: Iterator[bool]) -> tuple[T, ...]:
    """The items to keep; consumes one value of `keep` per item."""
    return tuple(item for item in items if next(keep))


def _frontier(steps: Sequence[ProgramGraph], bound: dict[str, Binding], stay: set[str]) -> list[str]:
    """Names of the values to hoist: independent of the latents, not in `stay`, and used by a value of the body."""
    found: dict[str, None] = {}
    for step in steps:
        for node in step.graph.nodes:
            name = _captured_name(node)
            if name is None or name in stay or bound[name] & Binding.LATENTS:
                continue
            if any(_in_body(user, bound, stay) for user in node.users):
                found[name] = None
    return list(found)


def _in_body(node: fx.Node, bound: dict[str, Binding], stay: set[str]) -> bool:
    name = _captured_name(node)
    return name is None or name in stay or bool(bound[name] & Binding.LATENTS)


def _captured_name(node: fx.Node) -> str | None:
    """The name of the captured node that this one computes; None for nodes made by a pass, and for arguments."""
    return node.meta.get("captured_name") if node.op == "call_function" else None


def _nbytes(node: fx.Node) -> int:
    """Bytes of a node's result; 0 for parameters and inputs, which are in memory anyway."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if node.op == "call_function" and isinstance(value, torch.Tensor) else 0


def _given(each: Iterable[fx.Node], bound: dict[fx.Node, Binding]) -> list[fx.Node]:
    """The values that the timestep part uses but that do not themselves depend on the timestep."""
    given: dict[fx.Node, None] = {}
    pending = list(each)
    seen = set(pending)
    while pending:
        for used in pending.pop().all_input_nodes:
            if used in seen or used.op == "placeholder":
                continue
            seen.add(used)
            if bound[used] & Binding.TIMESTEP or not isinstance(used.meta.get("val"), torch.Tensor):
                pending.append(used)
            else:
                given[used] = None
    return list(given)


def _part(captured: CapturedGraph, graph: fx.Graph, results: Mapping[str, fx.Node], given: Sequence[fx.Node]) -> Part:
    """The part of `graph`, the captured graph with equal values merged, that computes `results` by name."""
    needed = needed_nodes(results.values(), given)
    rebuilt = Rebuild()
    tables = (captured.parameters, captured.constants, captured.inputs)
    parameters, constants, inputs = (
        [n for n in graph.nodes if n.op == "placeholder" and n in needed and n.name in t] for t in tables
    )
    for node in (*parameters, *constants, *inputs, *given):
        rebuilt.placeholder(node)
    for node in graph.nodes:
        if node in needed and node not in rebuilt:
            rebuilt.copy(node)
    return Part(
        graph=rebuilt.finish(rebuilt.new(tuple(results.values()))),
        parameters=tuple(captured.parameters[node.name] for node in parameters),
        constants=tuple(node.name for node in constants),
        inputs=tuple(captured.inputs[node.name] for node in inputs),
        given=tuple(node.name for node in given),
        results=tuple(results),
    )
