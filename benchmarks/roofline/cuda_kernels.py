"""The kernels that one operator launches on CUDA.

Rules, from PyTorch's sources:
- A view, and memory that is only allocated, cost nothing. A `reshape` or `to` that copies arrives here as that copy.
- Any other operator is one kernel that reads its arguments and writes its results once.
- A product with a one-dimensional bias is one kernel: cuBLASLt adds it in the epilogue. A convolution is one kernel,
  and its bias another.
- A lookup reads the rows that it needs, not the table; an operator of ours, the weights at its places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from benchmarks.roofline.kernel import Access, Extent, Kernel, Kind
from harmonica_rt.graph.layout import distinct

aten = torch.ops.aten

FREE = {
    aten._unsafe_view,
    aten.detach,
    aten.lift_fresh,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
LOOKUPS = {aten.embedding: 0, aten.index: 0, aten.index_select: 0, aten.gather: 0}  # which argument is the table
PRODUCTS = {aten._addmm_activation: aten.addmm}  # products under other names
OVERWRITING = {aten.copy_, aten._foreach_copy_}  # in place, without reading what was there

_Buffers = Callable[[Tensor], int]
"""Numbers the storage of a tensor."""


def kernels_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any, buffers: _Buffers) -> Iterator[Kernel]:
    """The kernels of an operator as the dispatcher calls it.

    Args:
        func: an OpOverload that is no composite.
        args, kwargs: its arguments.
        result: its result.
        buffers: numbers the storage of a tensor.
    """
    packet = func.overloadpacket
    if packet in FREE or _is_view(func):
        return
    written = [*_written_arguments(func, args, kwargs), *_tensors(result)]
    read = _read_arguments(func, args, kwargs)
    writes = accesses(written, buffers)
    if packet in LOOKUPS:
        table, *rest = read
        rows = Access(buffers(table), _view(table), sum(access.nbytes for access in writes))
        reads = (rows, *accesses(rest, buffers))
    else:
        reads = accesses(read, buffers)
    name, dtype = _name(func), next((tensor.dtype for tensor in read), torch.float32)
    if func.namespace == "harmonica":
        yield Kernel(name, Kind.HARMONICA, _at_places(func, args, kwargs, reads, buffers), writes, dtype=dtype)
    elif (packet := PRODUCTS.get(packet, packet)) in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
        extent = _extent(packet, args, result)
        if packet is aten.convolution and args[2] is not None:
            yield Kernel(name, Kind.PRODUCT, reads[:2], writes, flops, dtype, extent)
            yield Kernel("add (bias)", Kind.MEMORY, (*writes, *reads[2:]), writes, dtype=dtype)
        else:
            yield Kernel(name, Kind.PRODUCT, reads, writes, flops, dtype, extent)
    else:
        yield Kernel(name, Kind.MEMORY, reads, writes, dtype=dtype)


def attention_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, result: Tensor, buffers: _Buffers
) -> Kernel:
    """The kernel of an attention: fused, so that no `[queries, keys]` matrix reaches memory."""
    read = accesses([query, key, value, *([] if mask is None else [mask])], buffers)
    flops = int(sdpa_flop_count(query.shape, key.shape, value.shape))
    extent = Extent(math.prod(query.shape[:-2]), query.shape[-2], key.shape[-2], query.shape[-1])
    name = "attention" if mask is None else "attention (mask)"
    return Kernel(name, Kind.ATTENTION, read, accesses([result], buffers), flops, query.dtype, extent)


def accesses(tensors: list[Tensor], buffers: _Buffers) -> tuple[Access, ...]:
    """The memory of tensors, each part once."""
    found: dict[tuple[int, Any], Access] = {}
    for tensor in tensors:
        access = Access(buffers(tensor), _view(tensor), distinct(tensor).numel() * tensor.element_size())
        found[access.buffer, access.view] = access
    return tuple(found.values())


def _at_places(
    func: Any, args: Any, kwargs: Mapping[str, Any], reads: tuple[Access, ...], buffers: _Buffers
) -> tuple[Access, ...]:
    """What an operator of ours reads, with the bytes of its weights those of the elements at its places."""
    given = {argument.name: value for argument, value in _arguments(func, args, kwargs)}
    weights, places = given.get("weights"), given.get("places")
    if weights is None or places is None:  # `norm_rotary` has weights without places, the parameters of its norms
        return reads
    nbytes = weights.element_size() * len({place for place in places if place >= 0})
    whole = buffers(weights), _view(weights)
    return tuple(each._replace(nbytes=nbytes) if (each.buffer, each.view) == whole else each for each in reads)


def _view(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _is_view(func: Any) -> bool:
    """Whether all results share memory with an argument that is not written."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each given argument with its description in the schema."""
    described = {argument.name: argument for argument in func._schema.arguments}
    yield from zip(described.values(), args, strict=False)
    for name, value in kwargs.items():
        yield described[name], value


def _written_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = (value for argument, value in _arguments(func, args, kwargs) if _is_written(argument))
    return list(itertools.chain.from_iterable(map(_tensors, given)))


def _read_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    skips_written = func.overloadpacket in OVERWRITING
    given = (
        value
        for argument, value in _arguments(func, args, kwargs)
        if not (_is_written(argument) and (skips_written or argument.is_out))
    )
    return list(itertools.chain.from_iterable(map(_tensors, given)))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _extent(packet: Any, args: Any, result: Any) -> Extent:
    if packet is aten.convolution:
        weight = args[1]
        return Extent(1, result.numel() // weight.shape[0], weight.shape[0], math.prod(weight.shape[1:]))
    left, right = args[-2:] if packet in (aten.mm, aten.bmm) else args[1:3]
    return Extent(math.prod(left.shape[:-2]), left.shape[-2], right.shape[-1], left.shape[-1])


def _name(func: Any) -> str:
    if func.overloadpacket is aten._addmm_activation:
        return "addmm (gelu)"
    name: str = func.overloadpacket.__name__
    return f"harmonica.{name}" if func.namespace == "harmonica" else name
