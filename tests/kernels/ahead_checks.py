"""Kernels compiled ahead of their launches, over a stub of the driver. `test_triton_launcher.py` runs these.

Models run on the CPU, with the operators' Triton kernels in the place of those for the CPU. The stub runs nothing, so
only the launches are looked at.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import nn

import harmonica_rt as hrt
from benchmarks import models
from harmonica_kernels import _library
from harmonica_kernels.ahead_of_time import KernelError, OpCall, compile_kernels
from harmonica_kernels.forecast.triton import forecast_triton
from harmonica_kernels.norm_rotary.triton import norm_rotary_triton
from harmonica_kernels.residual_reuse import triton as residual_reuse
from harmonica_rt.execute import op_kernels, plan_cache
from tests.kernels.stub_driver import StubDriver
from tests.tiny import flux

STUB = StubDriver()
DEVICE = torch.device("cuda", 0)
STEPS = 4


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    """The device of the stub can be made the current one."""
    with (
        mock.patch.object(torch.cuda, "_exchange_device", return_value=0),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", return_value=0),
    ):
        yield
    STUB.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What identifies each kernel that Triton has compiled, or fetched from its cache on disk."""
    found: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **given: found.append(str(given["key"])))
    return found


@pytest.fixture(scope="module")
def triton_on_cpu() -> None:
    for op in ("forecast", "gated_residual", "norm_rotary", "residual_reuse", "residual_reuse_norm_modulate"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the operator had another implementation
            kernel = functools.partial(_library._with_triton, op)
            _library.LIBRARY.impl(op, kernel, "CPU", allow_override=True)


def rotary_arguments(heads: int, tensor: Callable[..., torch.Tensor]) -> tuple[Any, ...]:
    parts = [tensor((2, tokens, heads, 16), dtype=torch.bfloat16) for tokens in (3, 5)]
    weights = [tensor((16,), dtype=torch.bfloat16) for _ in parts]
    tables = [tensor((part.shape[1], 1, 16)) for part in parts]
    return parts, [2], weights, [None, None], tables, tables


def test_a_call_finds_its_kernel(compiled: list[str]) -> None:
    meta = functools.partial(torch.empty, device="meta")
    assert compile_kernels([OpCall("norm_rotary", rotary_arguments(7, meta), {})] * 3, DEVICE) == 1
    assert len(compiled) == 1
    norm_rotary_triton(*rotary_arguments(7, torch.zeros))
    assert len(compiled) == len(STUB.launches()) == 1
    norm_rotary_triton(*rotary_arguments(11, torch.zeros))
    assert len(compiled) == 2


def test_kernels_are_compiled_by_several_threads(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilations begin before one ends."""
    both = threading.Barrier(2, timeout=60)
    run = residual_reuse.residual_reuse_triton
    waiting = [True, True]

    def met(*args: Any) -> torch.Tensor:
        if waiting:
            waiting.pop()
            both.wait()
        return run(*args)

    monkeypatch.setattr(residual_reuse, "residual_reuse_triton", met)
    calls = []
    for width in (40, 56):
        x = torch.empty(2, 3, width, device="meta")
        calls.append(OpCall("residual_reuse", (x, [x], [None]), {}))
    assert compile_kernels(calls, DEVICE, workers=2) == 2
    assert len(set(compiled)) == 2


def test_places_of_weights_do_not_count(compiled: list[str]) -> None:
    """A step calls an operator with as many places as it has sites; all of them have one kernel, compiled once."""
    x, weights = torch.empty(2, 3, 104, device="meta"), torch.empty(30, 4, device="meta")
    places = [[4 * site, 4 * site + 1] for site in range(30)]
    calls = [OpCall("residual_reuse", (x, [x, x], [None], weights, each, [2]), {}) for each in places]
    calls += [OpCall("forecast", ([x, x], weights, each), {}) for each in places]
    assert compile_kernels(calls, DEVICE) == 2
    assert len(compiled) == 2
    x, weights = torch.zeros(2, 3, 104), torch.zeros(30, 4)
    for each in places:
        residual_reuse.residual_reuse_triton(x, [x, x], [None], weights, each, [2])
        forecast_triton([x, x], weights, each)
        STUB.clear()
    assert len(compiled) == 2


def test_offsets_count(compiled: list[str]) -> None:
    """A view that begins at no multiple of 16 bytes has a kernel of its own, and so has the call that comes."""
    whole = torch.zeros(2, 3, 49)
    view = whole[..., 1:]
    compile_kernels([OpCall("residual_reuse", (view, [view], [None]), {})], DEVICE)
    residual_reuse.residual_reuse_triton(view, [view], [None])
    assert len(compiled) == 1
    aligned = whole[..., :48]
    residual_reuse.residual_reuse_triton(aligned, [aligned], [None])
    assert len(compiled) == 2


def test_a_failure_names_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("PassManager::run failed\nand much more")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "warmup", fail)
    x = torch.empty(2, 3, 80, dtype=torch.float16, device="meta")
    with pytest.raises(KernelError, match=r"residual_reuse\(float16 \[2, 3, 80\].*PassManager::run failed$"):
        compile_kernels([OpCall("residual_reuse", (x, [x], [None]), {})], DEVICE)


def small_dit() -> tuple[nn.Module, list[dict[str, Any]]]:
    model = models.dit(layers=3, heads=2, head_dim=16)
    return model, models.dit_calls(model, 2, STEPS)


def small_flux() -> tuple[nn.Module, list[dict[str, Any]]]:
    model = flux(layers=1).transformer
    return model, models.flux_calls(model, 1, STEPS, side=4, text_tokens=4)


@pytest.mark.parametrize("build", [small_dit, small_flux], ids=["dit", "flux"])
@pytest.mark.parametrize("weights", [None, [1.5, -0.5]], ids=["plain", "weighted"])
def test_runs_compile_nothing(
    build: Callable[[], tuple[nn.Module, list[dict[str, Any]]]],
    weights: list[float] | None,
    compiled: list[str],
    triton_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = lambda lowered, device: op_kernels.compile_ahead(lowered, DEVICE)  # noqa: E731
    monkeypatch.setattr(plan_cache, "compile_ahead", ahead)
    model, calls = build()
    schedule = hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    if weights is not None:
        schedule = schedule.with_weights([[1.0, 0.0], [1.0, 0.0], *[weights] * (STEPS - 2)])
    fast = hrt.compile(model, schedule, lowering="fused")
    launched, planned = 0, 0
    for _ in range(3):  # the first without a forecast of timesteps
        fast.reset([float(call["timestep"][0]) for call in calls])
        for call in calls:
            fast(**call)
            planned = planned or len(compiled)
            launched += len(STUB.launches())
    assert launched > planned > 0  # the stub holds as many launches as a step makes
    assert len(compiled) == planned
    (plan,) = fast.report().plans
    assert 0 < plan.times.kernels < plan.times.total
    assert f"kernels {plan.times.kernels:.2f}" in str(fast.report())
