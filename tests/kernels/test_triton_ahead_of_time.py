"""The Triton kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harmonica_kernels._triton import TILE, tile_of
from harmonica_kernels.resources import (
    CAPABILITIES,
    VARIANTS,
    AnyVariant,
    Resources,
    RotaryVariant,
    Variant,
    measure,
    table,
)

REGISTERS = 65536  # of a multiprocessor, on all of these GPUs


def faults(variant: AnyVariant, found: Resources) -> Iterator[str]:
    """What a kernel may not do: spill, fill a multiprocessor alone, contract, load aligned rows in small pieces."""
    if found.stack:
        yield f"{found.stack} bytes of stack"
    if found.registers * found.warps * 32 > REGISTERS:
        yield f"{found.registers} registers for {found.warps} warps"
    if (isinstance(variant, RotaryVariant) or not variant.norm) and "fma.rn.f32" in found.ptx:
        yield "a product and a sum in one instruction, rounded otherwise than in the reference"
    loads = len(re.findall(r"ld\.global\.v4\.b32", found.ptx))
    if loads < wide_loads(variant):
        yield f"{loads} loads of 16 bytes"


def wide_loads(variant: AnyVariant) -> int:
    """The least number of loads of 16 bytes: one for each operand whose rows lie densely and in whole such pieces."""
    if isinstance(variant, RotaryVariant):
        tables = 0 if variant.per_pair else 4  # cos and sin are fp32: twice as wide as half types
        return variant.parts * (1 + (variant.norm != "none") + tables) if variant.interleaved else 0
    gates = variant.caches // max(1, variant.per_gate) if variant.gate == "batch" else 0
    return 1 + variant.caches + gates if variant.width % 16 == 0 else 0


def test_kernels_fit_every_gpu() -> None:
    """One test, so that parallel test processes do not compile all of it twice."""
    measured = measure()
    assert len(measured) == len(VARIANTS) * len(CAPABILITIES)
    found = [f"{v}, sm_{sm}: {fault}" for (v, sm), resources in measured.items() for fault in faults(v, resources)]
    assert not found, "\n".join(found)

    lines = table(measured).splitlines()
    assert lines[0].endswith("| warps | sm_80 | sm_90 | sm_100 |")
    assert len(lines) == 2 + len(VARIANTS)


def test_faults_are_found() -> None:
    good = Resources(warps=4, registers=32, stack=0, shared=0, ptx="ld.global.v4.b32 " * 3)
    assert not list(faults(Variant("bf16"), good))
    bad = Resources(warps=32, registers=128, stack=8, shared=0, ptx="fma.rn.f32 ld.global.b16")
    assert len(list(faults(Variant("bf16"), bad))) == 4
    assert len(list(faults(RotaryVariant("bf16"), bad))) == 4


@pytest.mark.parametrize("width", [384, 1024, 1152, 1408, 1536, 2048, 2304, 3072, 4096, 5120])
def test_tiles_of_rows_as_wide_as_models_are_full(width: int) -> None:
    rows, columns = tile_of(width)
    assert rows * columns == TILE
    assert width % columns == 0
