"""What Triton's launcher hands to the driver, against what the compiled kernels take.

`test_triton_launcher.py` runs these in a process of their own. Each launch is compared with the arguments of the Python
call: as many parameters as the machine code has, of its sizes, with the values of the call; and what was compiled in
(a stride of 1, a missing gate, a multiple of 16) holds for this call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from harmonica_kernels import _launch
from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.norm_rotary.triton import norm_rotary_triton
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
    """The calls of kernels within a block, with what was compiled for them.

    Attributes:
        made: arguments, grid and compiled kernel of each.
        direct: how many of them did not ask Triton for the kernel.
    """

    current: Calls | None = None

    def __init__(self) -> None:
        self.made: list[tuple[dict[str, Any], tuple[int, ...], Any]] = []
        self.direct = 0

    def __enter__(self) -> Calls:
        Calls.current = self
        STUB.launches()
        return self

    def __exit__(self, *_: object) -> None:
        Calls.current = None


def note_calls() -> None:
    """Note every call of a kernel in `Calls.current`, for the rest of the process."""
    run, bind = JITFunction.run, CompiledKernel.__getitem__

    def noted_run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(function, *args, grid=grid, warmup=warmup, **kwargs)
        if Calls.current is not None and not warmup:
            Calls.current.made.append((dict(zip(function.arg_names, args, strict=True)), grid, kernel))
        return kernel

    def noted_bind(kernel: Any, grid: tuple[int, ...]) -> Any:
        launch = bind(kernel, grid)

        def noted_launch(*args: Any) -> None:
            launch(*args)
            if Calls.current is not None:
                Calls.current.made.append((dict(zip(kernel.src.fn.arg_names, args, strict=True)), grid, kernel))
                Calls.current.direct += 1

        return noted_launch

    JITFunction.run, CompiledKernel.__getitem__ = noted_run, noted_bind


note_calls()


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
        return 8, number_of(value)
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
    with Calls() as calls:
        for _ in range(2):
            x, caches, gate, _ = operands(dtype, count, gates)
            residual_reuse_triton(x, caches, gate)
    kernels = check(calls)
    assert 2 * calls.direct >= len(kernels) == 2 * -(-count // MAX_TERMS[dtype.itemsize])


@pytest.mark.parametrize(("count", "dtype", "gates"), VARIANTS)
def test_residual_reuse_norm_modulate(count: int, dtype: torch.dtype, gates: str) -> None:
    with Calls() as calls:
        for _ in range(2):
            x, caches, gate, modulation = operands(dtype, count, gates)
            affine, shift = modulation[0, 0] if gates == "some" else None, None if gates == "none" else modulation
            residual_reuse_norm_modulate_triton(x, caches, gate, affine, None, modulation, shift, rms=count % 2 == 0)
    assert 2 * calls.direct >= len(check(calls)) >= 2


@pytest.mark.parametrize("gates", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gated_residual(dtype: torch.dtype, gates: str) -> None:
    with Calls() as calls:
        for _ in range(2):
            x, (y,), (gate,), _ = operands(dtype, 1, gates)
            gated_residual_triton(x, y, gate)
    assert 2 * calls.direct >= len(check(calls)) == 2


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("parts", [2, 9])
def test_norm_rotary(parts: int, across: bool) -> None:
    """Results of several parts each, so that parts are written at offsets."""
    with Calls() as calls:
        for _ in range(2):
            xs = [torch.zeros(2, 5 + index, 3, 16, dtype=torch.bfloat16) for index in range(parts)]
            tables = [torch.zeros(x.shape[1], 1, 16) for x in xs]
            weights = [x.new_zeros(48 if across else 16) for x in xs]
            counts, nothing = [1, parts - 1], [None] * parts
            norm_rotary_triton(xs, counts, weights, nothing, tables, tables, across=across)
    assert 2 * calls.direct >= len(check(calls)) == 2 * -(-parts // 8)


def test_a_wrong_call_is_refused_after_right_ones() -> None:
    x, caches, gates, _ = operands(torch.bfloat16, 2, "all")
    for _ in range(2):
        residual_reuse_triton(x, caches, gates)
    STUB.launches()
    for wrong, error in (
        ((x, [x, x[:, 1:]], gates), ValueError),
        ((x, [x, x.float()], gates), TypeError),
        ((x, caches, gates[:1]), ValueError),
        ((x, caches, [gates[0], x[:1, :3]]), ValueError),
    ):
        for _ in range(2):
            with pytest.raises(error, match="residual_reuse: "):
                residual_reuse_triton(*wrong)
    assert STUB.launches() == []


@pytest.mark.parametrize("read", {_launch._layouts_of, _launch._layouts_in_python})
def test_layouts_tell_what_a_launch_depends_on(read: Any) -> None:
    x, memory = torch.zeros(2, 4, 8), torch.zeros(65)
    alike = [[x, None], [torch.zeros(2, 4, 8), None], [memory[:64].view(2, 4, 8), None]]
    others: list[list[torch.Tensor | None]] = [
        *([x], [None, x], [x, x], [x.half(), None], [x.to("meta"), None], [x[:1], None], [x.mT, None]),
        *([x.view(8, 8), None], [memory[1:].view(2, 4, 8), None], [torch._efficientzerotensor(2, 4, 8), None]),
        [torch._neg_view(x.half()), None],
    ]
    assert len({read(tensors, torch.Tensor)[0] for tensors in alike}) == 1
    assert len({read(tensors, torch.Tensor)[0] for tensors in (alike[0], *others)}) == 1 + len(others)
    assert read([x, None], torch.Tensor)[1] == [x.data_ptr(), None]


def test_the_number_of_layouts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "MOST_LAYOUTS", 3)
    launches = _launch.Launches(lambda tensors: _launch.Prepared([], 0, []))
    for size in range(1, 10):
        assert launches.run([torch.zeros(size)]) == []
        assert 0 < len(launches._known) <= 3


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
