"""Inductor's regions on a fake `cuda:0`, compiled to machine code. `test_fake_cuda.py` runs these in a process."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.lower import inductor
from harmonica_rt.lower.compiled_region import CompiledRegion
from harmonica_rt.lower.inductor import InductorLowering, RegionProgram
from tests.fake_cuda import guard
from tests.fake_cuda.gpu import FakeGpu
from tests.fake_cuda.hopper import inductor_for_an_h100
from tests.fake_cuda.launches import makes_memory
from tests.fake_cuda.planned import Planned, planned
from tests.kernels.stub_driver import StubDriver
from tests.tiers import member
from tests.zoo.entry import TINY, calls_of, model_of
from tests.zoo.table import ZOO

guard.load()
STUB = StubDriver()

# The most that a full step and a step that reuses every site may launch, and the number of unique regions.
CLASSES = {
    "DiTTransformer2DModel": (30, 7, 5),
    "PixArtTransformer2DModel": (42, 7, 6),
    "FluxTransformer2DModel": (89, 9, 7),
}
LAUNCH = re.compile(r"\.run\(|extern_kernels\.\w+\(|= torch\.ops\.\w+\.")


def in_bf16(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, values)


def model_on_the_gpu(name: str) -> Planned:
    gpu, model = FakeGpu(), model_of(name, ZOO[name].config)
    arguments = in_bf16(calls_of(ZOO[name], model, TINY, 1)[0])
    return planned(gpu, gpu.move(model, torch.bfloat16), arguments)


def launches_of_code(code: str) -> int:
    """Triton kernels, products and fallbacks in the code that Inductor wrote for one region."""
    return len(LAUNCH.findall(code[code.index("def call(") : code.index("def benchmark_compiled_module(")]))


def launches_of_program(program: RegionProgram, regions: dict[str, int]) -> int:
    found = 0
    for node in graph_of(program).nodes:
        if isinstance(node.target, CompiledRegion):
            found += regions[node.target.__name__]
        elif node.op == "call_method" and node.target == "copy_":
            found += 1  # a store
        elif isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta:
            found += makes_memory(node)
        elif node.target is torch.ops.aten.addmm.out:
            found += 1
    return found


def graph_of(program: RegionProgram) -> fx.Graph:
    module: fx.GraphModule = program._run.__self__
    return module.graph


@pytest.mark.parametrize("name", [member(name, id=name, always=name.startswith("DiT")) for name in CLASSES])
def test_regions(name: str) -> None:
    found = model_on_the_gpu(name)
    with mock.patch.object(inductor, "MOST_OPERATORS", 0), inductor_for_an_h100(STUB) as written:
        lowering = found.lowered("inductor").lowering
    assert isinstance(lowering, InductorLowering)
    report = lowering.report().regions
    assert report is not None
    assert len(written) == report.unique
    regions = {f"region_{number}": launches_of_code(code) for number, code in enumerate(written)}
    assert all(regions.values())
    full, partial = (launches_of_program(program, regions) for program in lowering.programs)
    counts = (full, partial, report.unique)
    assert all(a <= b for a, b in zip(counts, CLASSES[name], strict=True)), counts


@pytest.mark.exhaustive
def test_a_step_program_in_one_piece() -> None:
    found = model_on_the_gpu("DiTTransformer2DModel")
    with inductor_for_an_h100(STUB) as written:
        report = found.lowered("inductor").lowering.report().regions
    assert report is not None
    assert report.whole == len(found.plan.programs)
    *_, full, partial = map(launches_of_code, written)
    assert full <= 30
    assert partial <= 7
