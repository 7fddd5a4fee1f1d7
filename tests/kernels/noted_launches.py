"""Calls of Triton kernels over a stub of the driver, and what each must hand to it.

Each launch is compared with the arguments of the Python call: as many parameters as the machine code has, of its sizes,
with the values of the call; and what was compiled in (a stride of 1, a missing gate, a multiple of 16) holds for this
call. Importing this installs the stub, which stays for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from tests.kernels.stub_driver import Launch, StubDriver

STUB = StubDriver()
BYTES = {"i1": 1, "i32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
SCRATCH = (8, 0)  # pointers to memory that Triton may add for a kernel; ours need none


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
    """Path, type and value of each scalar of an argument.

    An operand that is missing is None. Inside an operand, a named tuple, None is no value: kernels ask whether an
    operand is there, and Triton 3.4 to 3.6 do not compile that question about a tuple with None inside.
    """
    if isinstance(kind, tuple):
        assert not (hasattr(value, "_fields") and any(item is None for item in value)), f"None inside {value}"
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
