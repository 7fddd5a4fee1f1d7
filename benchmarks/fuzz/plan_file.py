"""Plan files, read by `harmonica_rt.load`; a plan that was read must run.

Most of the damage here knows the format: the JSON is valid and the digest matches, so that the checks behind both are
reached. A loaded plan is run for a whole schedule; it may make a wrong image, but must do no other harm.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import harmonica_rt as hrt
from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import changed, damaged_json, odd_value
from harmonica_rt.errors import HarmonicaError, PlanFileError
from harmonica_rt.planfile.file import contents_digest

STEPS = 3
LOWERINGS = ("plain", "fused")

_OPERATORS = (
    "add.Tensor", "mul.Tensor", "sub.Tensor", "div.Tensor", "linear.default", "matmul.default", "gelu.default",
    "silu.default", "sum.dim_IntList", "view.default", "reshape.default", "transpose.int", "slice.Tensor", "to.dtype",
    "unsqueeze.default", "expand.default", "repeat.default", "index.Tensor", "embedding.default", "gather.default",
    "full_like.default", "arange.default", "full.default", "empty_like.default", "as_strided.default",
    "empty.memory_format", "mul_.Tensor", "split.Tensor", "chunk.default", "unbind.int", "bernoulli.default",
    "from_file.default", "layer_norm.default", "rms_norm.default", "native_layer_norm.default", "batch_norm.default",
    "scaled_dot_product_attention.default", "where.self", "cat.default", "dropout.default", "bitwise_not.default",
    "constant_pad_nd.default", "remainder.Scalar", "pow.Tensor_Scalar", "sort.default", "mean.dim", "rsqrt.default",
)  # fmt: skip
_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 4, 7, 8, 63, 64, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 0.5, True, None)
_KEYWORDS = ("dtype", "alpha", "approximate", "self", "lambda", "x=__import__('os')", "\x1b[31m", "*", "memory_format")


class _Model(nn.Module):
    """Two blocks with a norm, an embedding of the timestep, and a table of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.classes = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """`latents` [B, N, 8], `timestep` [B], `class_labels` [B]."""
        shift = (self.embed(timestep[:, None]) + self.classes(class_labels))[:, None]
        for block in self.blocks:
            latents = latents + shift.chunk(2, dim=-1)[0].repeat(1, 1, 2) * block[1](block[2](block[0](latents)))
        return latents


@functools.cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Model().eval()


def _call(step: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(batch)
    latents = torch.randn(batch, 3, 8, generator=generator)
    return {"latents": latents, "timestep": torch.full((batch,), 1.0 - step / 10), "class_labels": labels}


@functools.cache
def _text(number: int) -> str:
    """A valid file; `number` selects the lowering and the number of plans."""
    schedule = hrt.Schedule.from_array([[True, True], [False, True], [True, False]], sites=["blocks.0.1", "blocks.1.1"])
    compiled = hrt.compile(_model(), schedule, lowering=LOWERINGS[number % 2], strict=True)
    for batch in (2, 1)[: 1 + number // 2]:
        compiled.reset()
        for step in range(STEPS):
            compiled(**_call(step, batch))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        compiled.save(path)
        return path.read_text()


def valid(rng: Random) -> bytes:
    """A valid file."""
    return _text(rng.randrange(4)).encode()


def damaged(rng: Random) -> bytes:
    """A damaged file, or a forged one, whose digest matches."""
    document: dict[str, Any] = json.loads(_text(rng.randrange(4)))
    if rng.random() < 0.2:
        return damaged_json(rng, document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = _forged(rng, document)
    document["digest"] = contents_digest(document)
    return json.dumps(document).encode()


def _forged(rng: Random, document: dict[str, Any]) -> dict[str, Any]:
    """The document with one change that keeps the JSON valid."""
    plan = rng.choice(document["plans"])
    if rng.random() < 0.25:
        part = rng.choice(("steps", "signature", "roles", "graph", "slot_offsets"))
        plan[part] = changed(rng, plan[part])
        return document
    graph = plan["graph"] if isinstance(plan.get("graph"), dict) else {}
    nodes = graph.get("nodes")
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, dict) for node in nodes):
        return document
    calls = [node for node in nodes if isinstance(node.get("args"), list)]
    match rng.randrange(8):
        case 0:
            _change_schedule(rng, document)
        case 1:
            _change_numbers(rng, plan)
        case 2 if len(nodes) > 1:
            a, b = rng.sample(range(len(nodes)), 2)
            nodes[a], nodes[b] = nodes[b], nodes[a]
        case 3 if len(nodes) > 1:
            nodes.insert(rng.randrange(len(nodes)), copy.deepcopy(rng.choice(nodes)))
        case _ if calls:
            _change_call(rng, rng.choice(calls), len(nodes))
    return document


def _change_call(rng: Random, node: dict[str, Any], nodes: int) -> None:
    args = node["args"]
    match rng.randrange(6):
        case 0:
            node["call"] = f"aten.{rng.choice(_OPERATORS)}"
        case 1 if len(args) > 1:
            a, b = rng.sample(range(len(args)), 2)
            args[a], args[b] = args[b], args[a]
        case 2 if args:
            args[rng.randrange(len(args))] = _argument(rng, nodes)
        case 3:
            node["kwargs"] = {rng.choice(_KEYWORDS): _argument(rng, nodes)}
        case 4:
            args.append(_argument(rng, nodes))
        case _:
            value = node.get("value")
            if isinstance(value, dict) and value:
                value[rng.choice(list(value))] = rng.choice(([], [rng.choice(_NUMBERS)] * 3, "float64", odd_value(rng)))


def _argument(rng: Random, nodes: int) -> Any:
    """An argument of an operator that may or may not fit."""
    number = rng.choice(_NUMBERS)
    return rng.choice(
        (
            *({"node": rng.randrange(nodes)}, {"node": rng.randrange(nodes)}, number, {"list": [number, number]}),
            *({"dtype": rng.choice(("float64", "int64", "bool", "complex64", "load"))}, {"device": "cpu"}),
            *({"float": rng.choice(("nan", "inf"))}, {"memory_format": "channels_last"}, odd_value(rng)),
        )
    )


def _change_schedule(rng: Random, document: dict[str, Any]) -> None:
    rows = document["schedules"][0]["compute"]
    row = rng.randrange(len(rows))
    rows[row] = "".join(rng.choice("01") for _ in rows[row])


def _change_numbers(rng: Random, plan: dict[str, Any]) -> None:
    """Change a slot offset or the shape of an argument."""
    offsets, leaves = plan.get("slot_offsets"), plan.get("signature", {})
    if rng.random() < 0.5 and isinstance(offsets, list) and offsets:
        offsets[rng.randrange(len(offsets))] = rng.choice((*_NUMBERS, -64, 128, 192))
    elif isinstance(leaves, dict) and isinstance(leaves.get("leaves"), list) and leaves["leaves"]:
        leaf = rng.choice(leaves["leaves"])
        if isinstance(leaf, dict) and isinstance(leaf.get("shape"), list) and leaf["shape"]:
            leaf["shape"][0] = rng.choice(_NUMBERS)


def read(path: Path) -> object:
    """The compiled model of a file."""
    return hrt.load(path, _model(), strict=True)


def check(result: object, path: Path) -> None:
    """The plan runs for both batch sizes that the file may have plans for, and leaves the model unchanged."""
    assert isinstance(result, hrt.CompiledModel)
    before = [tensor.clone() for tensor in _model().state_dict().values()]
    for batch in (2, 1):
        with suppress(HarmonicaError):  # documented: perhaps no run can follow the changed schedule
            result.reset()
            for step in range(result.schedule.steps):
                output = result(**_call(step, batch))
            assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output))
    assert all(torch.equal(a, b) for a, b in zip(before, _model().state_dict().values(), strict=True))


FORMAT = Format("plan", "plan.json", (PlanFileError,), valid, damaged, read, check)
