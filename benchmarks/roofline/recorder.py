"""Runs a program on meta tensors and records what it would launch on CUDA.

The program itself runs, stores and cloned outputs included, so what is counted is what would be launched. Composite
operators decompose as they do on CUDA, with two exceptions that depend on the device: attention and `rms_norm`, which
are one kernel there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline.cuda_kernels import FREE, accesses, attention_kernel, kernels_of
from benchmarks.roofline.kernel import Kernel, Kind

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Records the kernels of the operators that are called within it.

    Attributes:
        kernels: what was recorded, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self._alive: list[torch.UntypedStorage] = []  # so that no storage gets the number of another
        self._numbers: dict[int, int] = {}
        self._where = ""
        self._region: int | None = None
        self._regions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = _result_of(func, args, given)
        self.add(*kernels_of(func, args, given, result, self.buffer))
        return result

    def add(self, *kernels: Kernel) -> None:
        """Record kernels of the current module and region."""
        self.kernels += (replace(kernel, where=self._where, region=self._region) for kernel in kernels)

    def buffer(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._alive)
            self._alive.append(storage)
        return self._numbers[storage._cdata]

    def run(self, graph: fx.Graph, root: nn.Module, arguments: Sequence[Any]) -> Any:
        """Record a run of a graph on meta tensors."""
        with self, torch.no_grad():
            return self.interpret(graph, root, arguments)

    def interpret(self, graph: fx.Graph, root: nn.Module, arguments: Sequence[Any]) -> Any:
        """Run a graph node by node; call this within the recorder."""
        return _Interpreter(graph, root, self).run(*arguments)

    @contextmanager
    def within(self, where: str) -> Iterator[None]:
        """Within this block kernels belong to a module."""
        before, self._where = self._where, where or self._where
        yield
        self._where = before

    @contextmanager
    def region(self) -> Iterator[None]:
        """Within this block kernels belong to a region of their own."""
        self._region, self._regions = self._regions, self._regions + 1
        yield
        self._region = None


class _Interpreter(fx.Interpreter):
    """Runs a graph node by node, telling the recorder where each comes from."""

    def __init__(self, graph: fx.Graph, root: nn.Module, recorder: Recorder) -> None:
        super().__init__(root, graph=graph)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run a node of a module."""
        with self._recorder.within(_module_of(n)):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator, or record the kernel of one that decomposes otherwise on CUDA."""
        own = SPECIAL.get(target)
        return super().call_function(target, args, kwargs) if own is None else own(self._recorder, *args, **kwargs)


class _Layout(NamedTuple):
    """What the result of an operator depends on, of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


_results: dict[Any, Any] = {}  # results by operator and arguments, with layouts in place of tensors


def _result_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator; looked up where it was called before on such tensors, for blocks are alike."""
    may_alias = any(argument.alias_info is not None for argument in func._schema.arguments)
    if may_alias or func.overloadpacket in FREE:
        return func(*args, **kwargs)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    key = (func, spec, tuple(_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
    if key not in _results:
        result = func(*args, **kwargs)
        _results[key] = pytree.tree_map_only(Tensor, _layout, result)
        return result
    return pytree.tree_map_only(_Layout, _tensor, _results[key], is_leaf=lambda value: isinstance(value, _Layout))


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _tensor(layout: _Layout) -> Tensor:
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")


def meta_like(value: Any) -> Any:
    """The value with a meta tensor of the same layout in place of each tensor."""
    return pytree.tree_map_only(Tensor, lambda tensor: _tensor(_layout(tensor)), value)


def _attention(
    recorder: Recorder, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **named: Any
) -> Tensor:
    """Attention; its result is laid out as `[batch, queries, heads, depth]`, as the fused kernels write it."""
    mask = named.get("attn_mask", mask)
    shape = (*query.shape[:-1], value.shape[-1])
    if len(shape) < 4:
        result = query.new_empty(shape)
    else:
        result = query.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-2, -3)
    recorder.add(attention_kernel(query, key, value, mask, result, recorder.buffer))
    return result


def _rms_norm(
    recorder: Recorder, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    read = accesses([x, *([] if weight is None else [weight])], recorder.buffer)
    recorder.add(Kernel("rms_norm", Kind.MEMORY, read, accesses([result], recorder.buffer), dtype=x.dtype))
    return result


SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.rms_norm.default: _rms_norm,
}


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
