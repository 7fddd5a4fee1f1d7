"""Least squares of one entry, or of several that share weights, from second moments.

The moments are those of the changes of a site, `v_0`, `v_0 - v_1`, `v_1 - v_2`, ..., where `v_j` is its j-th latest
computed value, and of the error of plain reuse, `truth - v_0`. They add up over tensors, calls and sites.

Hazard: where a site hardly changes, products of its values lose in rounding what the weights depend on. So differences
are taken first, in float64, and the products of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

RIDGE = 1e-6
"""Weight of the squared distance from plain reuse in the least squares, with each change scaled to unit length."""

_CHUNK = 1 << 18  # elements of a tensor that are widened to float64 at a time

Moments = NDArray[np.float64]
"""`[values + 1, values + 1]`: the products of the changes and, last, of the error of plain reuse."""


def no_moments(values: int) -> Moments:
    """The moments of nothing, for a history of so many values."""
    return np.zeros((values + 1, values + 1))


def moments_of(truth: Any, values: Sequence[Any]) -> Moments:
    """The moments of one output of a site, a tensor or a tree; integers and what is no tensor are left out.

    Args:
        truth: the true output.
        values: the latest computed outputs, newest first, of the same structure and shapes.
    """
    total = no_moments(len(values))
    for true, *latest in zip(*(pytree.tree_leaves(tree) for tree in (truth, *values)), strict=True):
        if isinstance(true, torch.Tensor) and true.dtype.is_floating_point:
            total += _of_tensors([true, *latest])
    return total


def _of_tensors(truth_and_values: Sequence[torch.Tensor]) -> Moments:
    flat = [tensor.reshape(-1) for tensor in truth_and_values]
    count, device = len(flat), flat[0].device
    combine = torch.zeros(count, count, dtype=torch.float64)
    combine[:-1, 1:] = torch.from_numpy(_changes(count - 1))
    combine[-1, 0], combine[-1, 1] = 1.0, -1.0
    combine = combine.to(device)
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    for start in range(0, flat[0].numel(), _CHUNK):
        rows = combine @ torch.stack([tensor[start : start + _CHUNK].to(torch.float64) for tensor in flat])
        total += rows @ rows.T
    moments: Moments = total.cpu().numpy()
    return moments


def fitted_weights(moments: Moments) -> NDArray[np.float64]:
    """The weights `[values]` of the least squared error, near plain reuse as far as the changes do not tell."""
    products, error = moments[:-1, :-1], moments[:-1, -1]
    scale = np.sqrt(np.diag(products))
    scale = np.where(scale > 0.0, scale, 1.0)
    matrix = products / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    factors = np.linalg.solve(matrix, error / scale) / scale
    weights: NDArray[np.float64] = _plain_reuse(len(scale)) + factors @ _changes(len(scale))
    return weights


def squared_error(moments: Moments, weights: NDArray[np.float64]) -> float:
    """The sum of the squared errors that these weights leave."""
    values = len(weights)
    factors = np.linalg.solve(_changes(values).T, weights - _plain_reuse(values))
    left = np.append(-factors, 1.0)
    return max(0.0, float(left @ moments @ left))  # rounding may leave a perfect fit slightly below zero


def _changes(values: int) -> NDArray[np.float64]:
    """The changes as weights of the values, `[changes, values]`."""
    changes: NDArray[np.float64] = np.eye(values, k=-1) - np.eye(values)
    changes[0, 0] = 1.0
    return changes


def _plain_reuse(values: int) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.eye(1, values)[0]
    return weights
