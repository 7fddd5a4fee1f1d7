"""Weights that are moved about while a pipeline runs: by accelerate's hooks, by diffusers' groups.

Here the device that weights are moved to is the CPU, so that the hooks are the real ones and nothing is moved far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError
from tests.pipelines_in_use.small import FLUX
from tests.tiny import built, random_schedule, sample

STEPS = 5
CALL = FLUX.unguided


@pytest.fixture
def pipeline() -> Any:
    return built(FLUX.build)


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS, seed=2)


@pytest.fixture
def expected(pipeline: Any, schedule: Schedule) -> NDArray[Any]:
    hrt.reference(pipeline, schedule)
    images = sample(pipeline, STEPS, **CALL)
    hrt.uncompile(pipeline)
    return images


@pytest.mark.parametrize("first", ["compiled", "offloaded"])
def test_model_offload_keeps_one_plan(pipeline: Any, schedule: Schedule, expected: NDArray[Any], first: str) -> None:
    """The pipeline takes its hooks off and puts new ones on at the end of every run."""
    if first == "offloaded":
        pipeline.enable_model_cpu_offload(device="cpu")
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, debug=True)
    if first == "compiled":
        pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    report = hrt.get_compiled(pipeline).report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert len(report.plans) == 1
    pipeline.remove_all_hooks()
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def offload_layers(pipeline: Any) -> None:
    """What `enable_sequential_cpu_offload` hangs on every layer. It is of no use where both devices are the CPU."""
    for layer in pipeline.transformer.modules():
        if isinstance(layer, torch.nn.Linear):
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def test_offload_of_every_layer_runs_without_a_plan(pipeline: Any, schedule: Schedule, expected: NDArray[Any]) -> None:
    """A layer fetches its own weights when it is called: a graph would have nowhere to read them from."""
    hrt.compile(pipeline, schedule, lowering="plain", debug=True)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    offload_layers(pipeline)
    with pytest.warns(hrt.FallbackWarning, match="carry hooks, which a graph would bypass.*AlignDevicesHook"):
        assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    report = hrt.get_compiled(pipeline).report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert len(report.plans) == 1  # kept for when the hooks are gone
    assert "NOT COMPILED" in str(report)
    remove_hook_from_module(pipeline.transformer, recurse=True)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    # accelerate leaves each layer's forward on the object, so the model is not quite what it was before
    assert len(hrt.get_compiled(pipeline).report().plans) == 2


def test_offload_of_every_layer_is_an_error_in_strict_mode(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    offload_layers(pipeline)
    with pytest.raises(hrt.CaptureError, match="AlignDevicesHook"):
        sample(pipeline, STEPS, **CALL)


def test_groups_of_leaves_run_without_a_plan(pipeline: Any, schedule: Schedule, expected: NDArray[Any]) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.warns(hrt.FallbackWarning, match=r"diffusers hooks \(group_offloading\)"):
        assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)


def test_groups_of_blocks_are_an_error(pipeline: Any, schedule: Schedule) -> None:
    """They hang on the transformer itself, in the place of its forward."""
    hrt.compile(pipeline, schedule, lowering="plain")
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with pytest.raises(HarmonicaError, match=r"group_offloading.*enable_model_cpu_offload\(\)"):
        sample(pipeline, STEPS, **CALL)


def test_layerwise_casting_runs_without_a_plan(pipeline: Any, schedule: Schedule) -> None:
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="plain")
    with pytest.warns(hrt.FallbackWarning, match=r"diffusers hooks \(layerwise_casting\)"):
        assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_model_offload_to_a_gpu_and_back(pipeline: Any, schedule: Schedule, graphs: str) -> None:
    """Weights come to other addresses in every run."""
    pipeline.enable_model_cpu_offload()
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="plain", graphs=graphs, strict=True)
    for _ in range(3):
        np.testing.assert_allclose(sample(pipeline, STEPS, **CALL), expected, rtol=1e-4, atol=1e-5)
    assert pipeline.transformer.device.type == "cpu"
    assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)


@pytest.mark.gpu
def test_sequential_offload_to_a_gpu(pipeline: Any, schedule: Schedule) -> None:
    pipeline.enable_sequential_cpu_offload()
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="plain")
    with pytest.warns(hrt.FallbackWarning, match="AlignDevicesHook"):
        np.testing.assert_allclose(sample(pipeline, STEPS, **CALL), expected, rtol=1e-4, atol=1e-5)
