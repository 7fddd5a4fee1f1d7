"""`norm_rotary` to measure: queries and keys of a joint attention as Flux has it, an eighth of the tokens text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_ops import Op
from harmonica_kernels import norm_rotary
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference

EPS = 1e-6


class Heads(NamedTuple):
    """Arguments of the op.

    Attributes:
        parts: queries of text and of the image, then the keys of both: [B, tokens, heads, width].
        weight: [width].
        cos: [all tokens, width], fp32.
        sin: [all tokens, width], fp32.
    """

    parts: list[Tensor]
    weight: Tensor
    cos: Tensor
    sin: Tensor


def _draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, count: int) -> Heads:
    batch, tokens, inner = shape
    width = 128 if inner % 128 == 0 and inner > 2048 else 72
    sizes = [tokens // 8, tokens - tokens // 8] * 2
    parts = [torch.randn(batch, size, inner // width, width, device=device).to(dtype) for size in sizes]
    angles = torch.randn(tokens, width // 2, device=device).repeat_interleave(2, dim=-1)
    return Heads(parts, torch.randn(width, device=device).to(dtype), angles.cos(), angles.sin())


def arguments(a: Heads) -> tuple[Any, ...]:
    """The arguments of the op, by position."""
    text = a.parts[0].shape[1]
    cos, sin = ([table[:text, None], table[text:, None]] * 2 for table in (a.cos, a.sin))
    return a.parts, [2, 2], [a.weight] * 4, [None] * 4, cos, sin


def _eager(a: Heads) -> tuple[Tensor, ...]:
    normed = [functional.rms_norm(part, part.shape[-1:], a.weight, EPS) for part in a.parts]
    joined = (torch.cat(normed[:2], dim=1), torch.cat(normed[2:], dim=1))
    return tuple(apply_rotary_emb(each, (a.cos, a.sin), sequence_dim=1) for each in joined)


# Traffic of eager PyTorch in fp32, for queries and again for keys: norm, joining, one half with changed signs, and the
# turned pairs each read and write what they make (7 tensors); two products and their sum read and write 7 more. In half
# types the casts to fp32 and back come on top, and fp32 is twice as wide.
NORM_ROTARY = Op(
    "norm_rotary",
    lambda a: tuple(norm_rotary(*arguments(a), eps=EPS)),
    lambda a: tuple(norm_rotary_reference(*arguments(a), eps=EPS)),
    _eager,
    tensors=lambda count: 4,
    passes=lambda count: 28,
    targets={"cuda": "at least 0.9"},
    draw=_draw,
    most=1,
)
