"""`harmonica-rt doctor`: versions, hardware, what is built, and what will be used."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata

import typer

from harmonica_rt import __version__
from harmonica_rt.cli.console import console

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "safetensors")


def doctor() -> None:
    """Print versions, hardware, what is built and what will be used; exit status 1 if something is broken."""
    import torch

    import harmonica_kernels

    _title("versions")
    _line("harmonica-rt", __version__)
    _line("python", platform.python_version())
    for name in _PACKAGES:
        _line(name, _version(name))
    _title("hardware")
    _line(
        "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for line in _gpus() or ["none"]:
        _line("GPU", line)
    _line("torch's CUDA", torch.version.cuda or "not built in")
    _title("built and used")
    build = harmonica_kernels.build_info()
    _line("C++ ops", "built" if build.extension else f"not built: {build.reason}")
    _line("ops on CPU", "C++" if build.extension else "PyTorch reference")
    _line("ops on CUDA", "Triton" if importlib.util.find_spec("triton") else "PyTorch reference: no triton")
    _line(
        "lowerings",
        "fused (with the ops above), inductor (fused, the rest compiled), plain (bit for bit)",
    )
    _line("CUDA graphs", "one per step program" if torch.cuda.is_available() else "none: no CUDA device")
    if not build.extension and not build.chosen:
        console.print("the C++ ops were meant to be built; see the reason above", style="yellow")
        raise typer.Exit(1)


def _gpus() -> list[str]:
    """One line per GPU, from NVML, or one line that says why there is none."""
    try:
        import pynvml
    except ImportError:
        return ["unknown: nvidia-ml-py is not installed"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [f"none found ({error})"]
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [f"unknown: the driver does not answer ({error})"]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, driver: str) -> str:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    top = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
    return (
        f"{pynvml.nvmlDeviceGetName(handle)}, driver {driver}, {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} "
        f"GiB free, SM clock {clock} of {top} MHz"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _title(text: str) -> None:
    console.print(text, style="bold")


def _line(name: str, value: object) -> None:
    console.print(f"  {name:14} {value}", soft_wrap=True)
