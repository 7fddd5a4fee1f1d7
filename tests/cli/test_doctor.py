"""`harmonica-rt doctor`: what it says of this machine."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.cli.running import run


def test_doctor_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "none found (NVML Shared Library Not Found)" in result.output
    assert "lowerings      fused" in result.output
    assert "ops on CUDA    Triton" in result.output


def test_doctor_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Memory:
        free, total = 60 * 2**30, 80 * 2**30

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "590.1",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetMemoryInfo": Memory,
        "nvmlDeviceGetName": "Some GPU",
        "nvmlDeviceGetClockInfo": 1200,
        "nvmlDeviceGetMaxClockInfo": 1980,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    doctor = importlib.import_module("harmonica_rt.cli.doctor")  # the name in the package is the command
    assert doctor._gpus() == ["Some GPU, driver 590.1, 60.0 of 80.0 GiB free, SM clock 1200 of 1980 MHz"]


def test_doctor_notices_a_broken_build(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import harmonica_kernels

    broken = dataclasses.replace(harmonica_kernels.build_info(), extension=False, reason="it is torn", chosen=False)
    monkeypatch.setattr(harmonica_kernels, "build_info", lambda: broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "not built: it is torn" in result.output
