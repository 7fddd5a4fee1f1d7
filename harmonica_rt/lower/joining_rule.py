"""Decides which linear layers are joined: those whose products, one by one, leave much of a GPU idle.

A product is cut into tiles, which the multiprocessors of a GPU take in waves. The last wave is seldom full, and a small
product has no other: [512, 1152] x [1152, 1152] has 36 tiles of 128 x 128, where an H100 takes 132 at once. Queries,
keys and values joined have 108 tiles, and take one wave where they took three. Of large products nearly all waves
are full, so that joining them gains nothing and costs a copy of their parameters.

On a CPU nothing waits for a wave, so nothing is joined there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harmonica_rt.graph.facts import value_of
from harmonica_rt.lower.graph_states import BodyGraph
from harmonica_rt.lower.joined_products import Join, Layer, find_layers

DEVICES = frozenset({"cuda", "meta"})  # nothing runs on `meta`, where what would run on CUDA is predicted
MULTIPROCESSORS = 132  # of an H100; an A100 has 108, an L40S 142, an RTX 4090 128
TILE = 128  # rows and columns
MOST_WAVES = 5 / 6  # of those of the single products; above, the gain is lost in what this rule leaves out
LEAST_STEPS = 2  # that run the product: making its parameters takes about as long as one of them gains
LIMIT = 512 * 2**20  # bytes of joined parameters per stream


@dataclass(frozen=True)
class _Candidate:
    join: Join
    share: float  # of the waves of the single products
    steps: int


def choose_joins(bodies: Sequence[BodyGraph], steps: Sequence[int], *, limit: int = LIMIT) -> tuple[Join, ...]:
    """Choose what to join in the bodies of a plan, first where it gains most.

    A layer belongs to one join at most, so that its parameters are copied once.

    Args:
        bodies: the bodies.
        steps: for each, the number of steps of a run that it computes.
        limit: most bytes that the joined parameters of one stream may take.
    """
    found: dict[tuple[str, ...], _Candidate] = {}
    for body, count in zip(bodies, steps, strict=True):
        for group in find_layers(body):
            layers = Join.of(group).layers
            known = found[layers].steps if layers in found else 0
            found[layers] = _candidate(group, known + count)
    chosen: list[Join] = []
    taken: set[str] = set()
    left = limit
    for each in sorted(found.values(), key=lambda each: (each.share, -each.steps)):
        nbytes = sum(tensor.nbytes for tensor in each.join.tensors)
        if each.share > MOST_WAVES or each.steps < LEAST_STEPS or nbytes > left:
            continue
        if taken.isdisjoint(each.join.layers):
            chosen.append(each.join)
            taken.update(each.join.layers)
            left -= nbytes
    return tuple(chosen)


def _candidate(group: Sequence[Layer], steps: int) -> _Candidate:
    value: torch.Tensor = value_of(group[0].node)
    rows = value.numel() // max(1, value.shape[-1])
    single = sum(waves(rows, layer.width) for layer in group)
    together = waves(rows, sum(layer.width for layer in group))
    return _Candidate(Join.of(group), together / single if value.device.type in DEVICES else math.inf, steps)


def waves(rows: int, columns: int) -> int:
    """The number of waves of a product with a result `[rows, columns]`."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return max(1, math.ceil(tiles / MULTIPROCESSORS))
