"""The time of a kernel on a GPU, and the floor of a step.

A kernel takes `launch + max(shortest, bytes / bandwidth, FLOPs / peak)`, with the share of bandwidth and peak that its
kind reaches. Products are cut into tiles that the multiprocessors take in waves: a product of few tiles leaves some of
them idle, and the best of the known tiles counts. Caches are not modelled: all bytes come from memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from benchmarks.roofline.gpus import Gpu, Tile, attention_block, host, tiles
from benchmarks.roofline.kernel import Extent, Kernel, Kind


def seconds_of(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of a kernel, its launch included."""
    return gpu.launch + max(gpu.shortest, _moving(kernel.nbytes, gpu), _computing(kernel, gpu))


def step_seconds(kernels: Iterable[Kernel], gpu: Gpu) -> float:
    """Seconds of kernels that run one after another."""
    return sum(seconds_of(kernel, gpu) for kernel in kernels)


def floor_seconds(kernels: Iterable[Kernel], other_bytes: int, gpu: Gpu) -> float:
    """Seconds that a step cannot go below: its products and attentions without launches, and the other bytes.

    Args:
        kernels: the kernels of the step; those that only move memory are ignored, since they could be fused.
        other_bytes: features loaded from slots, the call's tensors and the outputs.
        gpu: the GPU.
    """
    products = (kernel for kernel in kernels if kernel.kind in (Kind.PRODUCT, Kind.ATTENTION))
    at_best = sum(max(_moving(kernel.nbytes, gpu), kernel.flops / _rate(kernel, gpu)) for kernel in products)
    return at_best + _moving(other_bytes, gpu)


def products_seconds(kernels: Iterable[Kernel], other_bytes: int, gpu: Gpu) -> float:
    """What `benchmarks.latency.floor` would measure: each product as the library computes it, and the other bytes."""
    products = (kernel for kernel in kernels if kernel.kind in (Kind.PRODUCT, Kind.ATTENTION))
    return step_seconds(products, gpu) + _moving(other_bytes, gpu)


def host_seconds(kernels: Iterable[Kernel]) -> float:
    """Seconds that the host takes to launch kernels one by one, without a CUDA graph."""
    times, listed = host(), list(kernels)
    regions = {kernel.region for kernel in listed if kernel.region is not None}
    total = len(regions) * times.region
    for kernel in listed:
        if kernel.kind is Kind.HARMONICA:
            total += times.harmonica + times.cache * (caches(kernel) - 1)
        else:
            total += times.operator if kernel.region is None else times.compiled
    return total


def caches(kernel: Kernel) -> int:
    """The number of values that a harmonica operator adds to its first argument, which is as large as each of them."""
    first = kernel.reads[0].view[1]
    return max(1, sum(access.view[1] == first for access in kernel.reads) - 1)


def _moving(nbytes: int, gpu: Gpu) -> float:
    return nbytes / (gpu.bandwidth * gpu.bandwidth_fraction)


def _rate(kernel: Kernel, gpu: Gpu) -> float:
    """FLOP/s that a kernel of this kind reaches at best."""
    fraction = gpu.attention_fraction if kernel.kind is Kind.ATTENTION else gpu.product_fraction
    return gpu.peaks.get(kernel.dtype, gpu.peaks[torch.float32]) * fraction


def _computing(kernel: Kernel, gpu: Gpu) -> float:
    if kernel.extent is None:
        return 0.0
    per_multiprocessor = _rate(kernel, gpu) / gpu.multiprocessors
    if kernel.kind is Kind.ATTENTION:
        rows, multiple = attention_block()
        depth = math.ceil(kernel.extent.depth / multiple) * multiple
        blocks = kernel.extent.batch * math.ceil(kernel.extent.rows / rows)
        flops = 4 * min(rows, kernel.extent.rows) * kernel.extent.columns * depth
        return _waves(blocks, gpu) * flops / per_multiprocessor
    return min(_tiled(kernel.extent, tile, gpu) / (per_multiprocessor * tile.share) for tile in tiles())


def _tiled(extent: Extent, tile: Tile, gpu: Gpu) -> float:
    """FLOPs that the busiest multiprocessor does."""
    count = extent.batch * math.ceil(extent.rows / tile.rows) * math.ceil(extent.columns / tile.columns)
    return _waves(count, gpu) * 2 * tile.rows * tile.columns * extent.depth


def _waves(count: int, gpu: Gpu) -> int:
    return math.ceil(count / gpu.multiprocessors)
