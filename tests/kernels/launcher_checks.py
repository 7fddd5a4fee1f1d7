"""What Triton's launcher hands to the driver, against what the compiled kernels take.

`test_triton_launcher.py` runs these in a process of their own. Each launch is compared with the arguments of the Python
call: as many parameters as the machine code has, of its sizes, with the values of the call; and what was compiled in
(a stride of 1, a missing gate, a multiple of 16) holds for this call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.residual_reuse.triton import MAX_TERMS, residual_reuse_triton
from harmonica_kernels.residual_reuse_norm_modulate.triton import residual_reuse_norm_modulate_triton
from tests.kernels.stub_driver import Launch, StubDriver
from tests.tiers import member

STUB = StubDriver()
BYTES = {"i1": 1, "i32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
SCRATCH = (8, 0)  # pointers to memory that Triton may add for a kernel; ours need none
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = ("none", "all", "some")


class Calls:
    """The calls of kernels within a block, with what was compiled for them."""

    def __init__(self) -> None:
        self.made: list[tuple[dict[str, Any], tuple[int, ...], Any]] = []  # arguments, grid, compiled kernel

    def __enter__(self) -> Calls:
        run = JITFunction.run

        def noted(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=warmup, **kwargs)
            named = dict(zip(function.arg_names, args, strict=False)) | kwargs
            self.made.append(({name: named[name] for name in function.arg_names}, grid, kernel))
            return kernel

        self._patch = mock.patch.object(JITFunction, "run", noted)
        self._patch.start()
        STUB.launches()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def check(calls: Calls) -> list[Any]:
    """Compare all launches with their calls; return the compiled kernels."""
    launches = STUB.launches()
    assert len(launches) == len(calls.made) > 0
    for launch, (arguments, grid, kernel) in zip(launches, calls.made, strict=True):
        check_launch(launch, arguments, grid, kernel)
    return [kernel for _, _, kernel in calls.made]


def check_launch(launch: Launch, arguments: dict[str, Any], grid: tuple[int, ...], kernel: Any) -> None:
    assert launch.grid == (*grid, 1, 1)[:3]
    assert launch.block == (32 * kernel.metadata.num_warps, 1, 1)
    assert launch.shared == kernel.metadata.shared
    constants = {(path if isinstance(path, tuple) else (path,)): v for path, v in kernel.src.constants.items()}
    expected: list[tuple[int, int]] = []
    compiled_in = 0
    for number, (name, value) in enumerate(arguments.items()):
        for path, kind, given in leaves((number,), kernel.src.signature[name], value):
            if kind == "constexpr":
                compiled_in += 1
                assert constants[path] == given
            else:
                assert "tt.divisibility" not in facts_of(kernel, path) or int(number_of(given)) % 16 == 0
                expected.append(parameter(kind, given))
    assert compiled_in
    assert list(launch.parameters[: len(expected)]) == expected
    assert set(launch.parameters[len(expected) :]) <= {SCRATCH}


def leaves(path: tuple[int, ...], kind: Any, value: Any) -> Iterator[tuple[tuple[int, ...], str, Any]]:
    """Path, type and value of each scalar of an argument."""
    if isinstance(kind, tuple):
        for index, (one, item) in enumerate(zip(kind, value, strict=True)):
            yield from leaves((*path, index), one, item)
    elif value is None and kind == "constexpr":
        yield path, kind, None
    else:
        yield path, kind, value


def facts_of(kernel: Any, path: tuple[int, ...]) -> dict[str, Any]:
    """What the compiler took for granted about an argument."""
    return dict(kernel.src.attrs.get(path, []))


def number_of(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def parameter(kind: str, value: Any) -> tuple[int, int]:
    """Bytes and value as the driver sees a parameter of this type."""
    if kind.startswith("*"):
        return 8, value.data_ptr()
    if kind == "fp32":
        return 4, int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) % 2**32
    return BYTES[kind], value % 2 ** (8 * BYTES[kind])


def gates_for(kind: str, gate: torch.Tensor, count: int) -> list[torch.Tensor | None]:
    return [None if kind == "none" or (kind == "some" and index % 2) else gate for index in range(count)]


def operands(dtype: torch.dtype, count: int, gates: str, width: int = 128) -> tuple[Any, Any, Any, torch.Tensor]:
    """x, caches, gates, and a slice of a modulation as adaLN makes it; all tensors apart from each other."""
    x, *caches = (torch.zeros(2, 16, width, dtype=dtype) for _ in range(count + 1))
    gate = x.new_zeros(2, 6 * width).chunk(6, dim=1)[1].unsqueeze(1)
    return x, caches, gates_for(gates, gate, count), gate


VARIANTS = [
    member(
        *(count, dtype, gates),
        id=f"{count}-{name}-{gates}",
        always=count in (1, 9, 16) and (name == "bf16" or gates == "some"),
    )
    for count, (name, dtype), gates in itertools.product(range(1, 17), DTYPES.items(), GATES)
]


@pytest.mark.parametrize(("count", "dtype", "gates"), VARIANTS)
def test_residual_reuse(count: int, dtype: torch.dtype, gates: str) -> None:
    x, caches, gate, _ = operands(dtype, count, gates)
    with Calls() as calls:
        residual_reuse_triton(x, caches, gate)
    kernels = check(calls)
    assert len(kernels) == -(-count // MAX_TERMS[dtype.itemsize])


@pytest.mark.parametrize(("count", "dtype", "gates"), VARIANTS)
def test_residual_reuse_norm_modulate(count: int, dtype: torch.dtype, gates: str) -> None:
    x, caches, gate, modulation = operands(dtype, count, gates)
    affine = modulation[0, 0] if gates == "some" else None
    with Calls() as calls:
        residual_reuse_norm_modulate_triton(
            x, caches, gate, affine, None, modulation, None if gates == "none" else modulation, rms=count % 2 == 0
        )
    check(calls)


@pytest.mark.parametrize("gates", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gated_residual(dtype: torch.dtype, gates: str) -> None:
    x, (y,), (gate,), _ = operands(dtype, 1, gates)
    with Calls() as calls:
        gated_residual_triton(x, y, gate)
    check(calls)


def test_fp64_launches_nothing() -> None:
    x, caches, gates, _ = operands(torch.float64, 2, "all")
    STUB.launches()
    assert torch.equal(residual_reuse_triton(x, caches, gates), x)
    assert STUB.launches() == []


def test_a_kernel_is_not_taken_for_what_it_was_not_compiled_for() -> None:
    """Calls that differ in alignment, strides or a missing gate each get a kernel of their own; equal ones share it."""
    x, caches, gates, gate = operands(torch.bfloat16, 2, "all")
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    calls_of = {
        "again": (torch.zeros_like(x), caches, gates),
        "other rows": (torch.zeros(2, 17, 128, dtype=x.dtype), [torch.zeros(2, 17, 128, dtype=x.dtype)] * 2, gates),
        "unaligned": (memory[1:].view(x.shape), caches, gates),
        "strided": (torch.zeros(2, 16, 256, dtype=x.dtype)[..., ::2], caches, gates),
        "gate missing": (x, caches, [gate, None]),
    }
    with Calls() as calls:
        residual_reuse_triton(x, caches, gates)
    (first,) = check(calls)
    for name, arguments in calls_of.items():
        with Calls() as calls:
            residual_reuse_triton(*arguments)
        (kernel,) = check(calls)
        assert (kernel is first) is (name in ("again", "other rows")), name


def test_a_wrong_launch_is_noticed() -> None:
    x, caches, gates, _ = operands(torch.bfloat16, 1, "all")
    with Calls() as calls:
        residual_reuse_triton(x, caches, gates)
    (arguments, grid, kernel), (launch,) = calls.made[0], STUB.launches()
    for wrong in ({"rows": arguments["rows"] + 1}, {"x": arguments["caches"][0]}, {"WIDTH": 64}):
        with pytest.raises(AssertionError):
            check_launch(launch, arguments | wrong, grid, kernel)
    check_launch(launch, arguments, grid, kernel)


def test_triton_is_the_one_of_the_stub() -> None:
    assert type(triton.runtime.driver.active).__name__ == "CudaDriver"
    assert triton.runtime.driver.active.get_current_target().arch == 90
