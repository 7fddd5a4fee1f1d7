"""What Triton's launcher hands to the driver, against what the compiled kernels take.

`test_triton_launcher.py` runs these in a process of their own. Each launch is compared with the arguments of the Python
call: as many parameters as the machine code has, of its sizes, with the values of the call; and what was compiled in
(a stride of 1, a missing gate, a multiple of 16) holds for this call.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton

from harmonica_kernels import _launch
from harmonica_kernels.forecast.triton import forecast_triton
from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.norm_rotary.triton import norm_rotary_triton
from harmonica_kernels.norm_rotary.triton_kernel import Place
from harmonica_kernels.residual_reuse.triton import MAX_TERMS, residual_reuse_triton
from harmonica_kernels.residual_reuse_norm_modulate.triton import residual_reuse_norm_modulate_triton
from tests.kernels.noted_launches import STUB, Calls, check, check_launch, leaves
from tests.tiers import member

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = ("none", "all", "some")


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


COUNTS = [[1], [2], [2, 2, 1], [4] * 5, [2] * 9]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights(dtype: torch.dtype, counts: list[int]) -> None:
    """Every launch has the codes of its own places, and other places have no other kernel."""
    found = []
    for first in (0, 1, 8, 12, 16, 64):
        with Calls() as calls:
            for _ in range(2):
                x, caches, _, gate = operands(dtype, sum(counts), "all")
                weighting = torch.zeros(32, 4), list(range(first, first + sum(counts)))
                residual_reuse_triton(x, caches, gates_for("some", gate, len(counts)), *weighting, counts)
        kernels = check(calls)
        assert 2 * calls.direct >= len(kernels)
        given = [code >> 2 for arguments, _, _ in calls.made[: len(kernels) // 2] for code in arguments["codes"]]
        assert given == weighting[1]
        found.append(kernels)
    assert all(kernels == found[0] for kernels in found)


def test_weights_before_a_norm_and_alone() -> None:
    weights, places = torch.zeros(4, 4), [3, -1, 5]
    with Calls() as calls:
        for _ in range(2):
            x, caches, _, gate = operands(torch.bfloat16, 3, "all")
            weighting = {"weights": weights, "places": places, "counts": [2, 1]}
            residual_reuse_norm_modulate_triton(x, caches, [gate, None], None, None, gate, gate, **weighting)
            forecast_triton(caches, weights, places)
            gated_residual_triton(x, caches[0], gate, weights, [7])
    assert 2 * calls.direct >= len(check(calls)) == 6


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


@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_rotary_of_parts_that_differ(interleaved: bool) -> None:
    """Each part lacks other operands, or has tables of another form: dense, per pair, or per pair and for all rows."""
    dense, pairs = torch.zeros(5, 3, 16), torch.zeros(5, 3, 8, 2)[..., 0]
    tables = [None, dense, dense[:, :1], pairs, pairs[:, :1], pairs[0, 0], None, pairs]
    vectors = [torch.zeros(16, dtype=torch.bfloat16) if index % 3 else None for index in range(8)]
    with Calls() as calls:
        for _ in range(2):
            xs = [torch.zeros(2, 5, 3, 16, dtype=torch.bfloat16) for _ in tables]
            norm_rotary_triton(xs, [8], vectors, vectors[::-1], tables, tables, norm="layer", interleaved=interleaved)
    assert 2 * calls.direct >= len(check(calls)) == 2


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
        ((x, caches, gates, torch.zeros(4), [0, 4]), ValueError),
        ((x, caches, gates, None, [0, 1]), ValueError),
        ((x, caches, gates, torch.zeros(4).half(), [0, 1]), TypeError),
        ((x, caches, gates, torch.zeros(4), [0, 1], [3, -1]), ValueError),
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


def test_none_inside_an_operand_is_noticed() -> None:
    kind = (Place("*bf16", "i32", "i32", ("i32",), ()), "constexpr")  # type: ignore[arg-type]
    place = Place(torch.zeros(4), 0, 0, (0,), ())
    assert len(list(leaves((0,), kind, (place, None)))) == 5
    with pytest.raises(AssertionError, match="None inside"):
        list(leaves((0,), kind, (place._replace(outer=None), None)))  # type: ignore[arg-type]


def test_triton_is_the_one_of_the_stub() -> None:
    assert type(triton.runtime.driver.active).__name__ == "CudaDriver"
    assert triton.runtime.driver.active.get_current_target().arch == 90
