"""The Triton kernels against the references: tests of the interpreter tier on the CPU, of the gpu tier on a device."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
from torch import Tensor

from harmonica_kernels.gated_residual.reference import gated_residual_reference
from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference
from harmonica_kernels.norm_rotary.triton import norm_rotary_triton
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference
from harmonica_kernels.residual_reuse.triton import residual_reuse_triton
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference
from harmonica_kernels.residual_reuse_norm_modulate.triton import residual_reuse_norm_modulate_triton
from tests.kernels import test_norm_rotary as rotary
from tests.kernels.test_residual_reuse_norm_modulate import Arguments, assert_in_tolerance, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SHAPES = [
    pytest.param((2, 3, 1152), id="two-blocks"),
    pytest.param((2, 5, 77), id="odd"),
    pytest.param((2, 2, 3, 65), id="four-dimensions"),
    pytest.param((77,), id="vector"),
    pytest.param((2, 3, 1), id="one-column"),
]
GATES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda x: None,
    "width": lambda x: x[0, 0],
    "batch": lambda x: torch.cat([x[:, :1]] * 6, dim=-1).chunk(6, dim=-1)[2],
    "full": lambda x: x.flip(0),
    "transposed": lambda x: x.mT.contiguous().mT,
    "row-number": lambda x: x[..., :1],
    "batch-number": lambda x: x[:, :1, :1],
    "number": lambda x: x[0, 0, 0],
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows-cut-off": lambda t: t[:, 3:],
    "unaligned": lambda t: t[..., 1:],
    "transposed": lambda t: t[..., :6].transpose(1, 2),
    "every-second": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1].expand(4, -1, -1),
    "three-strides": lambda t: t.reshape(2, 2, 5, 30).transpose(0, 2)[:3],
}


def on_device(t: Tensor) -> Tensor:
    """A copy with the same strides."""
    if t.device.type == DEVICE:
        return t
    whole = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device=DEVICE)
    whole.copy_(t.as_strided(whole.shape, (1,), 0))
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """The interpreter cuts bf16 off where a GPU rounds to nearest: there, an ulp."""
    assert found.is_contiguous()
    ulp = torch.finfo(torch.bfloat16).eps if INTERPRETED and found.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found.cpu(), expected, rtol=ulp, atol=0, equal_nan=True)


def compare_sum(x: Tensor, caches: list[Tensor], gates: list[Tensor | None]) -> None:
    moved = [None if gate is None else on_device(gate) for gate in gates]
    found = residual_reuse_triton(on_device(x), [on_device(cache) for cache in caches], moved)
    assert_same_bits(found, residual_reuse_reference(x, caches, gates))


def compare_norm(arguments: Arguments, rms: bool = False, eps: float = 1e-5) -> None:
    hidden, out = residual_reuse_norm_modulate_triton(*arguments.map(on_device), rms=rms, eps=eps)
    assert_same_bits(hidden, residual_reuse_norm_modulate_reference(*arguments)[0])
    assert_in_tolerance(arguments, (hidden.cpu(), out.cpu()), rms, eps)


def test_kernels_run_where_they_should() -> None:
    assert triton.knobs.runtime.interpret is INTERPRETED


@pytest.mark.parametrize("op", ["gated_residual", "norm_rotary", "residual_reuse", "residual_reuse_norm_modulate"])
def test_ops_on_cuda_are_the_kernels(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op does with CUDA tensors, whatever the device of these."""
    module, name = f"harmonica_kernels.{op}.triton", f"{op}_triton"
    kernel = Mock(wraps=getattr(sys.modules[module], name))
    monkeypatch.setattr(sys.modules[module], name, kernel)
    x = torch.ones(2, 40, device=DEVICE)
    arguments: tuple[Any, ...] = (x, x) if op == "gated_residual" else (x, [x], [None])
    if op == "norm_rotary":
        arguments = ([x[None]], [1], *[[None]] * 4)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    getattr(torch.ops.harmonica, op).default.redispatch(cuda, *arguments)
    kernel.assert_called_once()


def test_offsets_beyond_32_bits() -> None:
    size = 2**31 + 64
    if INTERPRETED:  # the system provides only the pages that are touched
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    memory[-64:] = torch.arange(64)
    for shape, strides in (((3, 64), (2**30, 1)), ((1, 64, 3), (0, 1, 2**30))):
        x = memory.as_strided(shape, strides)
        assert torch.equal(residual_reuse_triton(x, [x], [None]), 2 * x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y, gate = (torch.randn(shape).to(dtype) for _ in range(3))
    for g in (None, gate, gate[..., :1]):
        found = gated_residual_triton(*(None if t is None else on_device(t) for t in (x, y, g)))
        assert_same_bits(found, gated_residual_reference(x, y, g))


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str) -> None:
    x, *caches = torch.randn((4, 2, 5, 77)).to(torch.float16)
    compare_sum(x, caches, [GATES[gate](cache) for cache in caches])


@pytest.mark.parametrize("count", [2, 9, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_caches(dtype: torch.dtype, count: int) -> None:
    arguments = draw((2, 1, 40), dtype, count)
    compare_sum(*arguments[:3])
    compare_norm(arguments)


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view: str) -> None:
    x, *caches = (VIEWS[view](t) for t in torch.randn(3, 4, 5, 30).half())
    compare_sum(x, caches, [x[:, :1], None])
    compare_norm(Arguments(x, caches, [None, x[:, :1]], x.flatten(0, -2)[0], None, x[..., :1, :], x[:1, :1, ..., :1]))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_bit_pattern(dtype: torch.dtype) -> None:
    """Subnormals, infinities, NaN, ties and overflow; the interpreter's own bf16 is too far from a GPU's."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bf16 in a way of its own")
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    compare_sum(every, [every[torch.randperm(1 << 16)]], [every[torch.randperm(1 << 16)]])


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype, shape: tuple[int, ...], rms: bool) -> None:
    compare_norm(draw(shape, dtype), rms)
    compare_norm(draw(shape, dtype, affine=False), rms, eps=0.5)


@pytest.mark.parametrize("absent", ["weight", "bias", "scale", "shift", "weight bias scale shift"])
def test_what_is_absent_changes_nothing(absent: str) -> None:
    compare_norm(draw((2, 5, 77), torch.float32)._replace(**dict.fromkeys(absent.split())))


@pytest.mark.parametrize("count", [1, 17])
def test_statistics_are_of_the_unrounded_hidden(count: int) -> None:
    """The numbers beside 256 are lost where hidden is rounded to bf16, and all that the norm has to go by."""
    cache = torch.linspace(-0.4, 0.4, 64).to(torch.bfloat16)[None] / count
    compare_norm(Arguments(torch.full_like(cache, 256), [cache] * count, [None] * count, None, None, None, None))


def test_mean_far_from_zero() -> None:
    arguments = draw((2, 3, 1152), torch.float32)
    compare_norm(arguments._replace(x=arguments.x + 1000))


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 8), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    assert residual_reuse_triton(x, [x], [None]).shape == shape
    assert [t.shape for t in residual_reuse_norm_modulate_triton(x, [x], [None])] == [shape, shape]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 77), (torch.float32, 8193)], ids=["fp64", "wide"])
def test_what_the_reference_is_left(dtype: torch.dtype, width: int) -> None:
    arguments = draw((2, 2, width), dtype)
    compare_sum(*arguments[:3])
    compare_norm(arguments)


def compare_rotary(arguments: rotary.Arguments) -> None:
    found = [out.cpu() for out in arguments.map(on_device).call(norm_rotary_triton)]
    rotary.assert_in_tolerance(arguments, found)


@pytest.mark.parametrize(("shape", "settings"), [param for param in rotary.SWEEP if "threaded" not in param.values])
def test_norm_rotary(shape: str, settings: str) -> None:
    for per_pair, dtype in ((False, torch.float16), (True, torch.float32)):
        compare_rotary(rotary.draw(shape, dtype, per_pair, **rotary.KINDS_OF_CALL[settings]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", ["rms-pairs", "halves"])
def test_norm_rotary_dtypes(settings: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bf16 in a way of its own")
    arguments = rotary.draw("joint", dtype, **rotary.KINDS_OF_CALL[settings])
    compare_rotary(arguments)
    if dtype in HALF:
        compare_rotary(arguments.map(Tensor.float, "weights", "biases").map(Tensor.double, "cos", "sin"))


@pytest.mark.parametrize("view", rotary.VIEWS)
@pytest.mark.parametrize("settings", ["rms-pairs", "layer-across"])
def test_norm_rotary_of_strided_views(settings: str, view: str) -> None:
    arguments = rotary.draw("joint", torch.float32, **rotary.KINDS_OF_CALL[settings]).map(rotary.VIEWS[view])
    compare_rotary(arguments)


def test_norm_rotary_of_many_parts_and_other_heads() -> None:
    nine, (q, k) = list(torch.randn(9, 2, 3, 5, 8)), (torch.randn(2, 4, 6, 8), torch.randn(2, 3, 2, 8))
    for parts, counts in ((nine, [4, 5]), ([q, k], [1, 1])):
        nothing = [[None] * len(parts)] * 4
        moved = [on_device(part) for part in parts]
        for found, expected in zip(
            norm_rotary_triton(moved, counts, *nothing), norm_rotary_reference(parts, counts, *nothing), strict=True
        ):
            torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float64, (2, 3, 4, 8)), (torch.float32, (2, 3, 4, 7)), (torch.float32, (2, 2, 8194))]
)
def test_norm_rotary_that_the_reference_is_left(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    arguments = ([1], [None], [None], [None], [None])
    (found,), (expected,) = norm_rotary_triton([on_device(x)], *arguments), norm_rotary_reference([x], *arguments)
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)], ids=str)
def test_norm_rotary_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    assert [t.shape for t in norm_rotary_triton([x], [1], [None], [None], [None], [None])] == [shape]
