"""The constants of GPUs and of the host, as `gpus.toml` has them."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows

PATH = Path(__file__).parent / "gpus.toml"
DTYPES = ("bfloat16", "float16", "float32")
GRAPHED_STEP = "host, per step: compiled model"  # the row of host_path


@dataclass(frozen=True)
class Gpu:
    """What a prediction needs to know of a GPU.

    Attributes:
        name: its name.
        peaks: dense FLOP/s of products by dtype.
        bandwidth: bytes/s of its memory.
        multiprocessors: their number.
        launch: seconds between the kernels of a CUDA graph.
        shortest: seconds of a kernel that does nothing.
        product_fraction: share of the peak that large products reach.
        attention_fraction: share of the peak that fused attention reaches.
        bandwidth_fraction: share of the bandwidth that copies reach.
    """

    name: str
    peaks: Mapping[torch.dtype, float]
    bandwidth: float
    multiprocessors: int
    launch: float
    shortest: float
    product_fraction: float
    attention_fraction: float
    bandwidth_fraction: float


@dataclass(frozen=True)
class Host:
    """Seconds of the host per launch, on the machine that the project is developed on.

    Attributes:
        operator: a PyTorch operator.
        harmonica: an operator of harmonica_kernels with one cache.
        cache: each further cache of it.
        compiled: a kernel of a compiled region.
        region: the call of a compiled region.
        graphed_step: a step that is one CUDA graph.
    """

    operator: float
    harmonica: float
    cache: float
    compiled: float
    region: float
    graphed_step: float


@dataclass(frozen=True)
class Tile:
    """A tile of the result of a product, and the share of `product_fraction` that a product of such tiles reaches."""

    rows: int
    columns: int
    share: float


@functools.cache
def constants() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads(PATH.read_text("utf-8"))


@functools.cache
def gpus() -> dict[str, Gpu]:
    """The GPUs by name."""
    return {name: _gpu(name, _values(table)) for name, table in constants()["gpus"].items()}


@functools.cache
def tiles() -> tuple[Tile, ...]:
    """The tiles that a product may be cut into."""
    sizes = {tuple(map(int, name.split("x"))): share for name, share in _values(constants()["tiles"]).items()}
    return tuple(Tile(rows, columns, share) for (rows, columns), share in sizes.items())


@functools.cache
def attention_block() -> tuple[int, int]:
    """The rows of queries per program of fused attention, and the multiple that its depth is padded to."""
    table = _values(constants()["attention"])
    return int(table["rows"]), int(table["depth"])


@functools.cache
def host() -> Host:
    """The host's times."""
    measured = {row["metric"]: row["value"] for row in rows.read(rows.RESULTS / "host_path.json")}
    return Host(**_values(constants()["host"]), graphed_step=measured[GRAPHED_STEP])


def _values(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in table.items()}


def _gpu(name: str, values: Mapping[str, Any]) -> Gpu:
    others = {key: value for key, value in values.items() if key not in DTYPES}
    return Gpu(name, {getattr(torch, dtype): values[dtype] for dtype in DTYPES}, **others)
