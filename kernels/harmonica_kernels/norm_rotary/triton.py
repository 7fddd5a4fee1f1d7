"""`norm_rotary` for CUDA: one launch for all parts of all results."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton

from harmonica_kernels._launch import Launch, Launches, Memory, NotRows, OptionalTensor, Prepared
from harmonica_kernels._triton import DTYPES, MAX_WIDTH, warps_of
from harmonica_kernels.norm_rotary.operands import Operands, Settings
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference
from harmonica_kernels.norm_rotary.triton_kernel import Extent, Place, kernel

ELEMENTS: Final = 1024  # numbers per program, where rows are narrower. Not measured yet
MAX_PARTS: Final = 8  # per launch; joint attention has four. More compile a longer kernel


_new_place = functools.partial(tuple.__new__, Place)  # half the time of Place(...)


class _Place(NamedTuple):
    """A `Place` whose memory is not known yet.

    Attributes:
        number: of the tensor, in the memory of a call.
        offset: elements of that tensor before the first one.
        itemsize: bytes of an element.
        strides: the other fields of `Place`.
    """

    number: int
    offset: int
    itemsize: int
    strides: tuple[int, int, tuple[int, ...], tuple[int, ...]]


def norm_rotary_triton(
    parts: Sequence[torch.Tensor],
    counts: Sequence[int],
    weights: Sequence[OptionalTensor],
    biases: Sequence[OptionalTensor],
    cos: Sequence[OptionalTensor],
    sin: Sequence[OptionalTensor],
    *,
    dim: int = 1,
    norm: str = "rms",
    across: bool = False,
    eps: float = 1e-5,
    interleaved: bool = True,
) -> list[torch.Tensor]:
    """Each part normed and rotated, and the parts of each result joined along `dim`.

    Shapes, dtypes and errors are those of `harmonica_kernels.norm_rotary`.
    """
    tensors = [*parts, *weights, *biases, *cos, *sin]
    lengths = (len(parts), len(weights), len(biases), len(cos), len(sin))
    key = (lengths, tuple(counts), (dim, norm, bool(across), float(eps), bool(interleaved)))
    try:
        results = _LAUNCHES.run(tensors, *key)
    except NotRows:
        dense = [t.contiguous() if t is not None and t.stride(-1) != 1 else t for t in tensors]
        results = _LAUNCHES.run(dense, *key)
    if results is None:
        settings = Settings(dim, norm, across, eps, interleaved)._asdict()
        return norm_rotary_reference(parts, counts, weights, biases, cos, sin, **settings)
    return results


def _prepare(
    tensors: Sequence[Any], lengths: Sequence[int], counts: Sequence[int], given: tuple[Any, ...]
) -> Prepared | None:
    settings = Settings(*given)
    ends = list(itertools.accumulate(lengths))
    parts, *others = (tensors[end - length : end] for end, length in zip(ends, lengths, strict=True))
    operands = Operands(parts, counts, *others)
    operands.check(settings)
    tile = _rows_and_pairs(operands, settings.across)
    if tile is None:
        return None
    shapes = [operands.shape_of(members, settings.dim) for members in operands.results()]
    results = [torch.empty(shape, dtype=parts[0].dtype, device="meta") for shape in shapes]
    shares = [
        (len(tensors) + number, share)
        for number, (out, members) in enumerate(zip(results, operands.results(), strict=True))
        for share in out.split([parts[index].shape[settings.dim] for index in members], settings.dim)
    ]
    filled = [index for index, part in enumerate(parts) if part.numel()]
    launches = [
        _launch(operands, shares, filled[begin : begin + MAX_PARTS], settings, tile)
        for begin in range(0, len(filled), MAX_PARTS)
    ]
    return Prepared.of(results, len(results), launches)


def _rows_and_pairs(operands: Operands, across: bool) -> tuple[int, int] | None:
    """Rows per program and pairs per row, both powers of two; None for parts that the kernel does not support.

    Not supported are fp64, rows of odd or of different widths, norms over more than a program holds, parts of more than
    four dimensions, and more programs than a grid can hold.
    """
    parts = operands.parts
    width = parts[0].shape[-1]
    most = max(part.shape[-2] for part in parts)
    if parts[0].dtype not in DTYPES or width % 2 or any(part.shape[-1] != width or part.ndim > 4 for part in parts):
        return None
    block: int = triton.next_power_of_2(width) if width else 0
    rows: int = triton.next_power_of_2(most) if most else 1
    if not across:
        rows = max(1, min(rows, ELEMENTS // max(block, 1)))
    programs = sum(part.numel() for part in parts)  # at most
    return (rows, block // 2) if rows * block <= MAX_WIDTH and programs < 2**31 * max(width, 1) else None


def _launch(
    operands: Operands,
    shares: Sequence[tuple[int, torch.Tensor]],
    indices: Sequence[int],
    settings: Settings,
    tile: tuple[int, int],
) -> Launch:
    """The launch for some parts.

    Args:
        shares: for each part, the index of its result in the memory of a call, and the view of it to write to.
    """
    parts, (rows, half) = operands.parts, tile
    outs = [_place(*shares[index], parts[index], offset=int(shares[index][1].storage_offset())) for index in indices]
    places = [
        [_place(number * len(parts) + index, tensors[index], parts[index]) for index in indices]
        for number, tensors in enumerate((parts, operands.weights, operands.biases, operands.cos, operands.sin))
    ]
    extents = tuple(_extent(parts[index], rows) for index in indices)
    programs = sum(extent.programs for extent in extents)
    numbers = (settings.eps, settings.norm, settings.across, settings.interleaved, parts[0].shape[-1], rows, half)

    def arguments(memory: Memory) -> tuple[Any, ...]:
        given = [tuple([place and _at(memory, *place) for place in each]) for each in (outs, *places)]
        return *given, extents, *numbers

    return Launch(kernel, programs, warps_of(2 * half * rows), arguments)


def _extent(part: torch.Tensor, rows: int) -> Extent:
    outer, middle, inner = _padded(list(part.shape[:-1]), 1)
    return Extent(middle, inner, outer * middle * math.ceil(inner / rows))


def _place(index: int, tensor: torch.Tensor | None, part: torch.Tensor, *, offset: int = 0) -> _Place | None:
    """Where the rows of a tensor lie that broadcasts to a part, or is a vector for the last dimensions of it.

    Raises:
        NotRows: the numbers of a row do not lie densely.
    """
    if tensor is None:
        return None
    width = part.shape[-1]
    if tensor.numel() > width and tensor.ndim == 1:  # a norm over the last two dimensions
        tensor = tensor.view(-1, width)
    per_pair = tensor.shape[-1] != width
    if tensor.stride(-1) != 1 and not per_pair:
        raise NotRows
    leading = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    outer, middle, inner = _padded([0 if size == 1 else stride for size, stride in leading], 0)
    own = () if per_pair and not inner else (inner,)
    pair = (tensor.stride(-1),) if per_pair else ()
    return _Place(index, offset, tensor.element_size(), (outer, middle, own, pair))


def _at(memory: Memory, index: int, offset: int, itemsize: int, strides: tuple[Any, ...]) -> Place:
    found = memory[index]
    if offset:
        found = found.view(-1)[offset:] if isinstance(found, torch.Tensor) else found + offset * itemsize
    return _new_place((found, *strides))


def _padded(values: list[int], filler: int) -> list[int]:
    return [filler] * (3 - len(values)) + values


_LAUNCHES: Final = Launches(_prepare)
