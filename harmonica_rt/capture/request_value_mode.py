"""Gives a model, while it is traced, data-dependent values: a mask's length, a flag in a tensor, a tensor as a list.

Hazard: tracing has no values, so a model that asks for them cannot be traced as it is. Yet a value that depends on the
request alone (the length of the prompt) is constant over a run. So whenever the model asks for one, the trace so far is
evaluated on the request, the model is given the value, and the value is recorded for `request_values`. A value that
depends on the latents, the timestep or the parameters may change from step to step; such a model has no static plan.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.changes import Changes
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.graph.facts import is_mutating
from harmonica_rt.graph.functionalise import storages_of, written_storages

T = TypeVar("T")

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
# These give tensors whose size depends on values.
_PLACES = (torch.nonzero, torch.Tensor.nonzero)
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class RequestValueMode(TorchFunctionMode):
    """Gives a model, while it is traced, the values of tensors that it asks for, and records them.

    Args:
        call: the call whose values are used.

    Attributes:
        values: the values that it was given, on the CPU.
        tensors: the traced tensors that they are the values of, in the same order, as they were at the time.
        asked: True if the model asked for any value.
        refused: True if it was refused one, because that value does not depend on the request alone.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []
        self.asked = self.refused = False
        self._autocast: tuple[torch.autocast, ...] = ()
        self._call = call
        self._arguments: dict[fx.Node, int] = {}
        self._tracer: Any = None

    def of(self, kwargs: Any) -> RequestValueMode:
        """This mode, reset for a trace in which the arguments of the call are `kwargs`."""
        mode: Any = get_proxy_mode()
        self._tracer = mode.tracer
        traced = enumerate(pytree.tree_leaves(kwargs))
        nodes = ((self._node(leaf), index) for index, leaf in traced if isinstance(leaf, torch.Tensor))
        self._arguments = {node: index for node, index in nodes if node is not None}
        devices = {leaf.device.type for leaf in self._call.leaves if isinstance(leaf, torch.Tensor)}
        self._autocast = tuple(map(_autocast_of, sorted(devices)))
        self.values, self.tensors = [], []
        return self

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

    def _read(self, tensor: torch.Tensor, convert: Callable[[torch.Tensor], T]) -> T:
        """`convert` applied to the tensor's value.

        Raises:
            CaptureError: the value does not depend on the request alone.
        """
        self.asked = True
        node = self._node(tensor)
        if node is None:  # not traced: made from a value that was read, or held by the model
            with _disable_current_modes():
                return convert(tensor.detach().cpu().clone())
        self.tensors.append(tensor.clone())
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # or a tracer would record the value
            self.values.append(self._value(node).cpu())
            return convert(self.values[-1].clone())

    def _node(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor in the current trace; None if it is not part of it."""
        traced: Any = get_proxy_slot(tensor, self._tracer, None)
        node: fx.Node | None = None if traced is None else traced.proxy.node
        return node

    def _places(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._read(mask, lambda value: tuple(index.to(mask.device) for index in value.nonzero().unbind(1)))

    def _value(self, read: fx.Node) -> torch.Tensor:
        """The value of a node that has just been traced, computed from the request."""
        nodes = _needed(read)
        self._check_request([node for node in nodes if node.op == "placeholder"], read)
        values: dict[fx.Node, Any] = {}
        with contextlib.ExitStack() as entered:
            for autocast in self._autocast:  # as when the trace began; the nodes switch it as the model did since
                entered.enter_context(autocast)
            for node in nodes:
                if node.op == "placeholder":
                    values[node] = self._call.leaves[self._arguments[node]].clone()  # the graph may write to it
                elif node.op == "get_attr":
                    held = getattr(self._tracer.root, str(node.target))
                    values[node] = held.clone() if isinstance(held, torch.Tensor) else held
                else:
                    target: Any = node.target
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = target(*args, **kwargs)
            value: torch.Tensor = values[read]
            for node in reversed(_left_open(nodes)):
                _exit_autocast(values[node])
        return value.detach()

    def _check_request(self, sources: Sequence[fx.Node], read: fx.Node) -> None:
        role_of = roles(self._call)
        given = [self._arguments[node] for node in sources if node in self._arguments]
        others = [self._call.paths[index] for index in given if role_of[index] is not Role.REQUEST]
        if others or len(given) < len(sources):
            self.refused = True
            source = others[0] if others else "a parameter"
            detail = (
                f"it reads a value that depends on {source}, which is not part of the request, so it may change "
                "between steps"
            )
            stack = read.meta.get("stack_trace")
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail, node=read.name, stack=stack))

    def _index(self, index: Any) -> Any:
        """`index`, with masks replaced by integer indices, and tensors that bound a slice by numbers."""
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


def keep_lists_whole(changes: Changes) -> None:
    """Let `RequestValueMode` see `tolist()` of traced tensors, whose own calls `item()`, until `changes` are undone."""
    for kind in (kind for kind in _TRACED if "tolist" in kind.__dict__):
        changes.undone_by(functools.partial(setattr, kind, "tolist", kind.__dict__["tolist"]))
        kind.tolist = torch.Tensor.tolist


def _autocast_of(device: str) -> torch.autocast:
    """A copy of the current autocast state of a device type, to be entered again."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _left_open(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that enter an autocast that no node leaves."""
    left = {node.args[0] for node in nodes if node.target is _exit_autocast}
    return [node for node in nodes if node.target is _enter_autocast and node not in left]


def _needed(read: fx.Node) -> list[fx.Node]:
    """The nodes that a node's value depends on, in order, including those that write to them or switch autocast."""
    needed = {node for node in read.graph.nodes if node.target in (_enter_autocast, _exit_autocast)}
    writers = [node for node in read.graph.nodes if is_mutating(node)]
    missing = [read]
    while missing:
        while missing:
            node = missing.pop()
            if node not in needed:
                needed.add(node)
                missing += node.all_input_nodes
        storages = set[int]().union(*map(storages_of, needed))
        missing = [node for node in writers if node not in needed and not storages.isdisjoint(written_storages(node))]
    return [node for node in read.graph.nodes if node in needed]
