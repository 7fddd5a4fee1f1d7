"""Spans of blocks in the reference: their residuals are kept, and added to what enters when they are reused.

Each call of a block has its own residuals, all against what entered the span: a block whose input is what the block
before it returned continues the span, and anything else that enters begins anew. Which input an output grew from is
found by following the residual additions while the block runs, by the same rules as in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from harmonica_rt.errors import SiteError
from harmonica_rt.graph.layout import laid_out
from harmonica_rt.graph.residual_origin import Origin, Whole, origin_after


@dataclass(frozen=True)
class Grown:
    """An output that a block grew from an input: the place of the input, and the dtype and strides of the output."""

    place: int
    dtype: torch.dtype
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Passed:
    """An output that is an input, unchanged: the place of the input."""

    place: int


@dataclass(frozen=True)
class BlockShape:
    """What one call of a block returns: its tree, and for each leaf how it comes about; plain values stand as they are.

    Places count the leaves of the block's arguments.
    """

    tree: pytree.TreeSpec
    leaves: tuple[Any, ...]


class SpanForward:
    """The calls of a span's blocks during one forward of the model.

    Args:
        span: its name, for messages.
        values: the residuals of each call; filled unless the span is reused.
        shapes: what each call returns; filled unless the span is reused.
        reused: whether the span is reused.
    """

    def __init__(self, span: str, values: list[Any], shapes: list[BlockShape], *, reused: bool) -> None:
        self._span = span
        self._values = values
        self._shapes = shapes
        self._reused = reused
        self._calls = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # what left a block, and what it grew from

    def call(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a block returns; `plain` computes it.

        Raises:
            SiteError: an output is a residual of no input, or a reused span is called more often than before.
        """
        number, self._calls = self._calls, self._calls + 1
        inputs = pytree.tree_leaves((args, kwargs))
        if self._reused:
            if number >= len(self._values):
                raise SiteError(f"{self._span}: a block ran more often than in the forward that computed it")
            return self._add(self._shapes[number], self._values[number], inputs)
        entered = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs]
        known = self._shapes[number] if number < len(self._shapes) else None
        if known is None:
            with _Origins(inputs) as origins:
                output = plain(*args, **kwargs)
            known = _shape_of(self._span, output, inputs, entered, origins)
            self._shapes.append(known)
        else:
            output = plain(*args, **kwargs)
        self._values.append(self._subtract(known, output, entered))
        return output

    def _subtract(self, shape: BlockShape, output: Any, entered: Sequence[Any]) -> list[torch.Tensor]:
        """The residuals of one call."""
        residuals = []
        for how, leaf in zip(shape.leaves, pytree.tree_leaves(output), strict=True):
            if isinstance(how, Grown | Passed):
                root = self._root(entered[how.place])
                self._seen.append((leaf.clone(), root))
                if isinstance(how, Grown):
                    residuals.append(leaf - root)
        return residuals

    def _add(self, shape: BlockShape, residuals: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Any:
        """What a reused call returns."""
        leaves, left = [], iter(residuals)
        for how in shape.leaves:
            if isinstance(how, Grown | Passed):
                root = self._root(inputs[how.place].clone())
                leaf = inputs[how.place]
                if isinstance(how, Grown):
                    leaf = laid_out((root + next(left)).to(how.dtype), how.strides)
                self._seen.append((leaf.clone(), root))
                leaves.append(leaf)
            else:
                leaves.append(how)
        return pytree.tree_unflatten(leaves, shape.tree)

    def _root(self, entering: torch.Tensor) -> torch.Tensor:
        """What the span entered with: that of the block before, if it returned this value; the value itself if none."""
        for value, root in reversed(self._seen):
            if value.shape == entering.shape and value.dtype == entering.dtype and torch.equal(value, entering):
                return root
        return entering


def _shape_of(span: str, output: Any, inputs: Sequence[Any], entered: Sequence[Any], origins: _Origins) -> BlockShape:
    leaves, tree = pytree.tree_flatten(output)
    return BlockShape(tree, tuple(_how(span, leaf, inputs, entered, origins) for leaf in leaves))


def _how(span: str, leaf: Any, inputs: Sequence[Any], entered: Sequence[Any], origins: _Origins) -> Any:
    """How a leaf of a block's output comes about."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for place, given in enumerate(inputs):
        if given is leaf and torch.equal(leaf, entered[place]):
            return Passed(place)
    origin = origins.of(leaf)
    if not isinstance(origin, Whole) or entered[origin.value].shape != leaf.shape:
        raise SiteError(f"{span} gives a value that it did not add to one that enters it")
    return Grown(origin.value, leaf.dtype, leaf.stride())


class _Origins(TorchDispatchMode):
    """Notes the origins of all tensors while it is active; those that enter are their own."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether torch.compile may run parts of the block (flex attention) as if this mode were not there."""
        return True

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._known: dict[int, Origin] = {}
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets their ids
        for place, leaf in enumerate(inputs):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self._note(leaf, Whole(place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        if results and all(isinstance(each, torch.Tensor) for each in results):
            shapes = [tuple(each.shape) for each in results]
            for each, origin in zip(results, origin_after(func, args, shapes, self.of, _shape), strict=True):
                if origin is not None:
                    self._note(each, origin)
                else:
                    self._known.pop(id(each), None)  # written in place
        return result

    def of(self, value: Any) -> Origin | None:
        """The origin of a tensor; None if it has none, or is no tensor."""
        return self._known.get(id(value)) if isinstance(value, torch.Tensor) else None

    def _note(self, tensor: torch.Tensor, origin: Origin) -> None:
        self._known[id(tensor)] = origin
        self._kept.append(tensor)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
