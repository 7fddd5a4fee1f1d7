"""One process, or several that train the same router, each on its share of each batch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from harmonica_training.errors import TrainingError


def join() -> None:
    """Join the process group that `torchrun` set up, if there is one and this process has not joined it yet."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave the process group, if there is one."""
    if _joined():
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def share(batch: int) -> range:
    """The indices of the samples of a batch that this process takes.

    Raises:
        TrainingError: the batch cannot be shared equally.
    """
    if batch % world():
        raise TrainingError(f"batch: expected a multiple of the {world()} processes, got {batch}")
    size = batch // world()
    return range(rank() * size, (rank() + 1) * size)


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if world() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world()


def gather(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The numbers of every process, in rank order; each passes equally many 64-bit integers, and its own device."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    if world() == 1:
        return [own.tolist()]
    everyone = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(everyone, own)
    return [one.tolist() for one in everyone]


def wait() -> None:
    """Wait until all processes have arrived here."""
    if world() > 1:
        dist.barrier()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
