"""Constants (tensors that tracing made) as JSON."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch

from harmonica_rt.errors import PlanFileError
from harmonica_rt.graph.layout import laid_out
from harmonica_rt.graph.layout_inference import Layout, layout_of
from harmonica_rt.planfile.json_fields import refused, text_of

LARGEST_CONSTANT = 2**20  # bytes; larger constants are not saved


def encode_constant(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The record of a constant: its elements in base64.

    Args:
        name: what the tensor is called in messages.
        tensor: the tensor.

    Raises:
        PlanFileError: it takes more than `LARGEST_CONSTANT` bytes.
    """
    if layout_of(tensor).nbytes > LARGEST_CONSTANT or tensor.nbytes > LARGEST_CONSTANT:
        raise PlanFileError(
            f"{name}: tracing made a constant of {tensor.nbytes} bytes; at most {LARGEST_CONSTANT} are saved"
        )
    plain = tensor.detach().cpu().contiguous()
    return {"data": base64.b64encode(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")}


def decode_constant(value: Any, layout: Layout, where: str) -> torch.Tensor:
    """The tensor of this layout that `encode_constant` encoded.

    Args:
        value: the text in base64, from a file that anyone may have written.
        layout: the tensor's layout.
        where: where the value stands in the file, for messages.

    Raises:
        PlanFileError: the value is not text in base64, its length does not match the layout, or the constant takes more
            than `LARGEST_CONSTANT` bytes.
    """
    nbytes = math.prod(layout.shape) * layout.dtype.itemsize
    if max(nbytes, layout.nbytes) > LARGEST_CONSTANT:
        raise PlanFileError(f"{where}: a constant of {max(nbytes, layout.nbytes)} bytes; at most {LARGEST_CONSTANT}")
    text = text_of(value, where)
    try:
        data = bytearray(base64.b64decode(text, validate=True))
    except ValueError as error:  # binascii.Error is a subclass, and text that is not ASCII raises one
        raise refused(where, "text in base64", value) from error
    if len(data) != nbytes:
        raise PlanFileError(f"{where}: expected {nbytes} bytes, got {len(data)}")
    if layout.dtype is torch.bool and not set(data) <= {0, 1}:
        raise PlanFileError(f"{where}: expected only the bytes 0 and 1, as the dtype is bool")
    flat = torch.frombuffer(data, dtype=layout.dtype) if data else torch.empty(0, dtype=layout.dtype)
    return laid_out(flat.view(layout.shape).to(layout.device), layout.stride)
