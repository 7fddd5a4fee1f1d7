"""Infers the layouts of a graph's values from its inputs, and tries each operator on real tensors.

Hazard: compiled code reads memory by the layouts that a graph carries; wrong ones would make it read foreign memory. So
the layouts of a saved graph are not taken from its file: every operator runs again on fake tensors, starting from the
model's own parameters and the signature's leaves. But fake tensors allow arguments that real kernels refuse, so each
distinct call of an operator also runs once on real tensors of zeros. The blocks of a model are alike, so this costs
little more than running one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from harmonica_rt.errors import PlanFileError
from harmonica_rt.graph.layout import extent


class Layout(NamedTuple):
    """A tensor's shape, strides (in elements), dtype and device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last, both included."""
        return extent(self.shape, self.stride) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.shape)} with strides {list(self.stride)} on {self.device}"


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout of a tensor.

    Raises:
        PlanFileError: the tensor is not strided, or has a size or stride that is not a known integer.
    """
    if tensor.layout is not torch.strided or not all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        raise PlanFileError(f"a tensor of layout {tensor.layout} and shape {tuple(tensor.shape)} cannot be saved")
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def layouts_of(value: Any) -> Any:
    """The layout of a tensor, or the list of layouts of several.

    Raises:
        PlanFileError: the value is neither a tensor nor a list or tuple of tensors, or one of them has no layout.
    """
    if isinstance(value, torch.Tensor):
        return layout_of(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value):
        return [layout_of(item) for item in value]
    raise PlanFileError(f"a value of type {type(value).__name__} cannot be saved")


class Inference:
    """Runs the operators of one graph on fake tensors, in graph order.

    Args:
        trial: whether to run each distinct call on real tensors as well.
    """

    def __init__(self, *, trial: bool) -> None:
        self._mode = FakeTensorMode()
        self._trial = trial
        self._tried: set[Any] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context with gradients and inference mode off; `tensor` and `run` must be called within it."""
        with torch.inference_mode(False), torch.no_grad():
            yield

    def tensor(self, layout: Layout, where: str) -> FakeTensor:
        """A fake tensor of this layout; `where` begins the messages of errors.

        Raises:
            PlanFileError: no tensor can have this layout, or the device has too little memory for it.
        """
        _check_size(layout, where)
        with self._mode:
            return _attempt(  # type: ignore[no-any-return]
                where, torch.empty_strided, layout.shape, layout.stride, dtype=layout.dtype, device=layout.device
            )

    def run(self, node: fx.Node, where: str) -> Any:
        """The result of a node for the values of its arguments.

        Raises:
            PlanFileError: its operator does not take them, returns anything but tensors, or needs too much memory.
        """
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        target: Any = node.target
        with self._mode:
            result = _attempt(where, target, *args, **kwargs)
        found = layouts_of(result)
        for layout in pytree.tree_leaves(found, is_leaf=lambda value: isinstance(value, Layout)):
            _check_size(layout, where)
        if self._trial and isinstance(target, torch._ops.OpOverload):
            self._try(target, args, kwargs, found, where)
        return result

    def _try(self, target: Any, args: Any, kwargs: Any, expected: Any, where: str) -> None:
        """Run an operator on real tensors, unless it has already run on tensors of these layouts."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        known = [layout_of(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves]
        key = (target, spec, tuple(known))
        if key in self._tried:
            return
        self._tried.add(key)
        try:
            result = _on_real(target, leaves, spec, 0)
        except Exception:  # zeros may be refused, as divisors: only what fails with ones too is an error
            result = _attempt(where, _on_real, target, leaves, spec, 1)
        if _without_strides(layouts_of(result)) != _without_strides(expected):
            raise PlanFileError(f"{where}: {target} returns another shape or dtype than was inferred")


def _on_real(target: Any, leaves: list[Any], spec: Any, value: int) -> Any:
    real = [_filled(layout_of(leaf), value) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(real, spec)
    return target(*args, **kwargs)


def _filled(layout: Layout, value: int) -> torch.Tensor:
    elements = layout.nbytes // layout.dtype.itemsize
    memory = torch.zeros(elements, dtype=layout.dtype, device=layout.device)
    if value:
        memory.fill_(value)
    return memory.as_strided(layout.shape, layout.stride)


def _without_strides(layouts: Any) -> Any:
    if isinstance(layouts, Layout):
        return layouts._replace(stride=())
    return [_without_strides(layout) for layout in layouts]


def _check_size(layout: Layout, where: str) -> None:
    """Raise PlanFileError if a value is larger than the memory of its device."""
    memory = _memory_of(layout.device)
    if layout.nbytes > memory:
        raise PlanFileError(f"{where}: a value needs {layout.nbytes} bytes, but {layout.device} has only {memory}")


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _attempt(where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `function`; whatever it raises becomes a PlanFileError, as torch has many error types for bad arguments."""
    try:
        return function(*args, **kwargs)
    except PlanFileError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise PlanFileError(f"{where}: {type(error).__name__}: {first[:200]!r}") from error
