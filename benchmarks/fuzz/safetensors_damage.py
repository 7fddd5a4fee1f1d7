"""Damages safetensors files according to their structure: header, metadata and numbers."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.fuzz.format import garbled
from benchmarks.fuzz.json_damage import changed, damaged_json

_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U64", "BOOL", "F8_E4M3", "F8_E8M0", "F4",
    "F6_E2M3", "C64", "f32", "", "\x1b[2J",
)  # fmt: skip
_SIZES = (0, 1, -1, 2, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 1.5, "4", None)


def damaged_safetensors(rng: Random, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file of the tensors and metadata, with changed tensors, header or bytes."""
    tensors = dict(tensors)
    match rng.randrange(5):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2))):
                _change(rng, tensors)
            return safetensors.torch.save(tensors, metadata)
        case 2 | 3:
            return _other_header(rng, safetensors.torch.save(tensors, metadata))
        case _:
            return garbled(rng, safetensors.torch.save(tensors, metadata))


def _change(rng: Random, tensors: dict[str, Tensor]) -> None:
    """Remove a tensor, or change its name, shape, dtype or one of its numbers."""
    if not tensors:
        return
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    match rng.randrange(6):
        case 0:
            tensors[rng.choice(("a", "", "\x1b[2J", "logits", "moment.99", "x" * 5000, *tensors))] = tensor
        case 1:
            tensors[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)))
        case 2:
            tensors[name] = rng.choice(
                (tensor[None], tensor.flatten()[:1], torch.cat([tensor.flatten()] * 2), tensor[..., None])
            )
        case 3 | 4 if tensor.is_floating_point() and tensor.numel():
            value = rng.choice((float("nan"), float("inf"), -float("inf"), 1e30, -1.0, 0.0))
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
            tensors[name] = tensor
        case _:
            pass


def _other_header(rng: Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    numbers = data[8 + size :]
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    kind = rng.randrange(6)
    if kind == 0 and entries:
        rng.choice(entries)["dtype"] = rng.choice(_DTYPES)
    elif kind == 1 and entries:
        entry = rng.choice(entries)
        entry["shape"] = rng.choice(
            ([0, 2**60], [2**64], [2**32, 2**32, 0], [], [1] * 70, changed(rng, entry["shape"]))
        )
    elif kind == 2 and entries:
        rng.choice(entries)["data_offsets"] = [rng.choice((*_SIZES, len(numbers))), rng.choice((*_SIZES, len(numbers)))]
    elif kind == 3:
        header["__metadata__"] = changed(rng, header.get("__metadata__", {}))
    text = damaged_json(rng, header) if kind >= 4 else json.dumps(header).encode()
    length = rng.choice((len(text),) * 12 + (0, 2**63, 2**64 - 1, len(text) + 1, 10**8 + 1))
    return length.to_bytes(8, "little") + text + numbers
