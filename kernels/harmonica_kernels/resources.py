"""Determines the GPU resources that the Triton kernels need (registers, stack, shared memory), without a GPU.

`python -m harmonica_kernels.resources` compiles them ahead of time and prints a table.

Hazard: a launch tells the compiler which addresses and strides are multiples of 16; without that, a different kernel is
compiled, with other registers and narrower loads. So the ops are called here as a model would call them, and stopped
at the point where Triton would compile. That needs process-wide settings of Triton, hence separate processes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.norm_rotary.triton import norm_rotary_triton
from harmonica_kernels.residual_reuse.triton import residual_reuse_triton
from harmonica_kernels.residual_reuse_norm_modulate.triton import residual_reuse_norm_modulate_triton

CAPABILITIES: Final = (80, 90, 100)  # A100; H100 and H200; B200
DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """A call of an op: `gated_residual`, `residual_reuse` or, with a norm, `residual_reuse_norm_modulate`.

    Attributes:
        dtype: a key of `DTYPES`.
        width: D.
        caches: number of caches; 0 for `gated_residual`.
        gate: "none", "batch" [B, 1, D], or "number" [B, 1, 1]. Gates [D] and [B, N, D] run the kernel of "batch".
        norm: "" for none, "layer", "rms", or either with "+affine" for a weight and, with LayerNorm, a bias.
        per_gate: 0 without weights; with them, the number of caches whose weighted sum each gate multiplies.
    """

    dtype: str
    width: int = 1152
    caches: int = 1
    gate: str = "batch"
    norm: str = ""
    per_gate: int = 0

    def call(self) -> None:
        """Call the Triton implementation of the op."""
        x = torch.zeros(2, 16, self.width, dtype=DTYPES[self.dtype])
        chunk = x.new_zeros(2, 6 * self.width).chunk(6, dim=1)[1].unsqueeze(1)  # as adaLN makes them
        gate = {"none": None, "batch": chunk, "number": chunk[..., :1]}[self.gate]
        counts = [self.per_gate] * (self.caches // self.per_gate) if self.per_gate else []
        caches, gates = [x] * self.caches, [gate] * (len(counts) or self.caches)
        weights = torch.zeros(self.caches, 4) if counts else None
        places = range(self.caches) if counts else ()
        weighting: dict[str, Any] = {"weights": weights, "places": places, "counts": counts}
        kind, _, affine = self.norm.partition("+")
        weight = chunk[0, 0] if affine else None
        bias = weight if kind == "layer" else None
        if kind:
            residual_reuse_norm_modulate_triton(
                x, caches, gates, weight, bias, chunk, chunk, rms=kind == "rms", eps=1e-6, **weighting
            )
        elif caches:
            residual_reuse_triton(x, caches, gates, **weighting)
        else:
            gated_residual_triton(x, x, gate)

    @property
    def cells(self) -> tuple[object, ...]:
        """The cells of the table that say what it is."""
        caches = f"{self.caches}, weighted by {self.per_gate}" if self.per_gate else self.caches
        return caches or "gated_residual", self.norm, self.gate, self.dtype, self.width


@dataclass(frozen=True)
class RotaryVariant:
    """A call of `norm_rotary` for queries and keys, [B, N, H, D].

    width: D.
    parts: number of parts, text and image of both if 4.
    norm: "rms", "layer" with a bias, "none", or "rms across" all heads.
    interleaved: whether the numbers of a pair are neighbours.
    per_pair: whether cos and sin have one number per pair, every second one in memory, as complex numbers do.
    heads: H.
    """

    dtype: str
    width: int = 128
    parts: int = 4
    norm: str = "rms"
    interleaved: bool = True
    per_pair: bool = False
    heads: int = 24

    def call(self) -> None:
        """Call the op."""
        x = torch.zeros(2, 16, self.heads, self.width, dtype=DTYPES[self.dtype])
        across = self.norm.endswith("across")
        weight = x.new_zeros(self.width * (self.heads if across else 1))
        table = torch.zeros(16, 1, self.width)
        table = table.view(16, 1, -1, 2)[..., 0] if self.per_pair else table
        weights, biases = (
            [weight if has else None] * self.parts for has in (self.norm != "none", self.norm == "layer")
        )
        norm_rotary_triton(
            [x] * self.parts,
            [self.parts // 2] * 2,
            weights,
            biases,
            [table] * self.parts,
            [table] * self.parts,
            norm=self.norm.split()[0],
            across=across,
            interleaved=self.interleaved,
        )

    @property
    def cells(self) -> tuple[object, ...]:
        """The cells of the table that say what it is."""
        pairs = "pairs" if self.interleaved else "halves"
        return f"norm_rotary, {self.parts} parts of {self.heads}", self.norm, pairs, self.dtype, self.width


AnyVariant = Variant | RotaryVariant

# A range of cache counts for bf16, in which models run; for the other dtypes, only the counts that differ most.
_CACHES: Final = {"bf16": (1, 2, 4, 8, 16), "fp16": (2, 16), "fp32": (1, 4, 8)}
VARIANTS: Final[tuple[AnyVariant, ...]] = (
    *(Variant(dtype, caches=k, norm=norm) for norm in ("", "layer") for dtype in DTYPES for k in _CACHES[dtype]),
    *(Variant("bf16", caches=0, gate=gate) for gate in ("none", "batch", "number")),
    *(Variant("bf16", caches=2, norm=norm, gate="none") for norm in ("layer+affine", "rms", "rms+affine")),
    *(Variant("bf16", width, caches=4, norm="layer") for width in (1153, 1536, 3072)),
    Variant("bf16", 3072, caches=16, norm="layer+affine"),
    *(Variant("bf16", caches=16, norm=norm, per_gate=2) for norm in ("", "layer")),
    Variant("fp32", caches=8, norm="layer", per_gate=1),
    Variant("bf16", 8192, caches=8, norm="layer+affine", per_gate=2),
    *(Variant(dtype, 8192, caches=8, norm="layer+affine") for dtype in ("bf16", "fp32")),
    *(RotaryVariant(dtype, parts=parts) for dtype in DTYPES for parts in (2, 4)),
    RotaryVariant("bf16", 64, norm="layer", parts=2, heads=30),  # CogVideoX
    RotaryVariant("bf16", 88, norm="layer", interleaved=False, parts=2, heads=16),
    RotaryVariant("bf16", norm="none", interleaved=False, parts=2),
    RotaryVariant("bf16", per_pair=True),  # Qwen-Image
    *(RotaryVariant("bf16", norm="rms across", per_pair=True, parts=2, heads=heads) for heads in (12, 40)),  # Wan
    RotaryVariant("bf16", 2048, parts=2, heads=1),  # LTX
)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: registers and bytes of stack per thread, and bytes of shared memory."""

    warps: int
    registers: int
    stack: int
    shared: int
    ptx: str


def measure(
    variants: Sequence[AnyVariant] = VARIANTS, capabilities: Sequence[int] = CAPABILITIES, processes: int = 2
) -> dict[tuple[AnyVariant, int], Resources]:
    """Compile the kernel of each variant for each compute capability (90 for 9.0); Triton caches them on disk."""
    work = [(variant, capability) for variant in variants for capability in capabilities]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(work, pool.map(_measure, work, chunksize=4), strict=True))


def table(measured: dict[tuple[AnyVariant, int], Resources]) -> str:
    """A Markdown table: one line per variant, with registers per compute capability, and the stack if there is one."""
    capabilities = sorted({capability for _, capability in measured})
    heads = [
        "caches, or op",
        "norm",
        "gate, or pairs",
        "dtype",
        "D",
        "warps",
        *(f"sm_{capability}" for capability in capabilities),
    ]
    lines = [heads, ["---"] * len(heads)]
    for variant in dict.fromkeys(variant for variant, _ in measured):
        found = [measured[variant, capability] for capability in capabilities]
        needs = [f"{one.registers}" + f" + {one.stack} B stack" * bool(one.stack) for one in found]
        lines.append([str(cell) for cell in (*variant.cells, found[0].warps, *needs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measure(work: tuple[AnyVariant, int]) -> Resources:
    variant, capability = work
    target = GPUTarget("cuda", capability, 32)
    ((kernel, compile_),) = _launches(variant, target)
    source = ASTSource(kernel, compile_["signature"], compile_["constants"], compile_["configs"][0])
    options = {name: compile_[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        dump = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump.stdout)
    registers, stack, shared = map(int, usage)
    return Resources(compiled.metadata.num_warps, registers, stack, shared, compiled.asm["ptx"])


def _launches(variant: AnyVariant, target: GPUTarget) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call would launch, each with Triton's compilation arguments; nothing is launched."""
    found = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((fn.jit_function, compile))
        return True  # stop here

    triton.knobs.runtime.jit_cache_hook = keep
    device = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**device, get_current_target=lambda: target))
    variant.call()
    return found


if __name__ == "__main__":
    print(table(measure()))
