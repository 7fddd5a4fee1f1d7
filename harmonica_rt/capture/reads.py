"""Values that a model reads while it runs: lengths counted in masks, a flag that is asked for, a list made of a tensor.

Hazard first: tracing has no values, so such a model cannot be traced as it is; traced with the values of one call, the
graph is wrong for a call with others, without an error. Yet what is read of the request alone (how long the prompt is)
stays as it is for a whole run. So the model runs once with the values noted down, is traced with those in their places,
and the graph is kept together with a small one that computes what was read, from the request. It is asked when a run
begins and when the request changes: other values mean another graph. What is read of the latents, the timestep or the
weights may change in every step; then there is no static plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.capture.roles import Role

T = TypeVar("T")
Values = tuple[tuple[Any, ...], ...]

_TO_PYTHON: dict[Any, Callable[[torch.Tensor], Any]] = {
    torch.Tensor.item: torch.Tensor.item,
    torch.Tensor.tolist: torch.Tensor.tolist,
    torch.Tensor.numpy: torch.Tensor.numpy,
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
}
_TRACED: tuple[Any, ...] = (FakeTensor, FunctionalTensor)
_OTHERWISE = "the model reads other values when it is traced than when it runs"
_PLACES = (torch.nonzero, torch.Tensor.nonzero)
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Reading(TorchFunctionMode):
    """Answers what a model reads: with the values themselves, which are noted down, or with those noted down before.

    Args:
        known: values of an earlier call, in the order they were read in; None to note them down.

    Attributes:
        values: what was read, on the CPU.
        tensors: the tensors that were read, in the same order; only where the values are known.
    """

    def __init__(self, known: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = list(known or ())
        self.tensors: list[torch.Tensor] = []
        self._known = known is not None
        self._own_lists: dict[Any, Any] = {}

    def __enter__(self) -> Reading:
        """The values are answered from the first one on."""
        self.tensors = []
        for kind in (kind for kind in _TRACED if "tolist" in kind.__dict__):  # their own take a list apart into items
            self._own_lists[kind] = kind.__dict__["tolist"]
            kind.tolist = torch.Tensor.tolist
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for kind, own in self._own_lists.items():
            kind.tolist = own

    def all_tensors(self) -> tuple[torch.Tensor, ...]:
        """What was read, one tensor for each value."""
        if len(self.tensors) != len(self.values):
            raise RuntimeError(_OTHERWISE)
        return tuple(self.tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in _TO_PYTHON and isinstance(args[0], torch.Tensor):
            return self._read(args[0], _TO_PYTHON[func])
        if func in _PLACES or (func is torch.where and len(args) == 1):
            places = self._places(args[0])
            return places if func is torch.where or kwargs.get("as_tuple") else torch.stack(places, 1)
        if func in _REPEATS and "output_size" not in kwargs:
            repeats = kwargs.get("repeats", args[min(1, len(args) - 1)])
            if isinstance(repeats, torch.Tensor):
                kwargs = {**kwargs, "output_size": self._read(repeats, lambda value: int(value.sum()))}
        elif func in _INDEXING:
            args = (args[0], self._index(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _read(self, tensor: torch.Tensor, what: Callable[[torch.Tensor], T]) -> T:
        """`what` of the tensor's value."""
        with _disable_current_modes():  # or a tracer would take hold of the value
            return what(self._value(tensor))

    def _places(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._read(mask, lambda value: tuple(index.to(mask.device) for index in value.nonzero().unbind(1)))

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._known:
            self.values.append(tensor.detach().cpu().clone())
            return self.values[-1]
        order = len(self.tensors)
        if order >= len(self.values) or self.values[order].shape != tensor.shape:
            raise RuntimeError(_OTHERWISE)
        self.tensors.append(tensor)
        return self.values[order]

    def _index(self, index: Any) -> Any:
        """An index without masks and without lengths that are tensors."""
        found: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8):
                found += self._places(part)
            elif isinstance(part, slice):
                found.append(slice(*(self._number(limit) for limit in (part.start, part.stop, part.step))))
            else:
                found.append(part)
        return tuple(found)

    def _number(self, limit: Any) -> Any:
        return self._read(limit, int) if isinstance(limit, torch.Tensor) else limit


@dataclass(frozen=True)
class RequestReads:
    """What a captured graph took for granted about the values of its request.

    Attributes:
        program: computes what was read, from the leaves of a call.
        inputs: which of the leaves it takes.
        values: what it gave.
    """

    program: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[int, ...]
    values: tuple[torch.Tensor, ...]

    def hold(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these leaves has the values that the graph was made for. Waits for their device."""
        read = self.program(*(leaves[index] for index in self.inputs))
        return all(torch.equal(a.cpu(), b) for a, b in zip(read, self.values, strict=True))

    @property
    def key(self) -> Values:
        """The values, to be compared and hashed."""
        return tuple(tuple(value.flatten().tolist()) for value in self.values)


def reads_of(
    program: torch.export.ExportedProgram,
    read: Sequence[fx.Node],
    values: Sequence[torch.Tensor],
    inputs: Mapping[str, int],
    constants: Mapping[str, torch.Tensor],
    leaf_roles: Sequence[Role],
) -> RequestReads | None:
    """What computes the values that were read, as a program of its own; None where nothing was read.

    Args:
        program: the traced model.
        read: the nodes that were read.
        values: what they gave.
        inputs: placeholder name -> index among the call's leaves.
        constants: placeholder name -> tensor made while tracing.
        leaf_roles: of the leaves.

    Raises:
        CaptureError: a value depends on something other than the request.
    """
    if not read:
        return None
    needed = set(read)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    holder = nn.Module()
    taken: list[int] = []
    for node in program.graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr" or node.name in constants:
            constant = constants[node.name] if node.name in constants else getattr(program.graph_module, node.target)
            holder.register_buffer(f"constant_{len(copies)}", constant)
            copies[node] = graph.get_attr(f"constant_{len(copies)}")
            continue
        if node.op == "placeholder":
            if node.name not in inputs or leaf_roles[inputs[node.name]] is not Role.REQUEST:
                raise CaptureError(_depends_on(node, read, needed))
            taken.append(inputs[node.name])
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in read))
    graph.lint()
    return RequestReads(fx.GraphModule(holder, graph, "Reads").forward, tuple(taken), tuple(values))


def _depends_on(source: fx.Node, read: Sequence[fx.Node], needed: set[fx.Node]) -> CaptureFailure:
    reached = {source}
    for node in source.graph.nodes:
        if node in needed and reached.intersection(node.all_input_nodes):
            reached.add(node)
    first = next(node for node in read if node in reached)
    return CaptureFailure(
        Obstacle.EXPORT,
        f"it reads a value that depends on {source.name}, which is not the request's: it may change in every step",
        node=first.name,
        stack=first.meta.get("stack_trace"),
    )
