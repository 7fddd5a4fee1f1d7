"""Pipelines and denoisers from local directories, and their arguments from the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.runtime.pipelines import denoiser_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(directory: Path, dtype: str = "fp32", device: str = "cpu") -> Any:
    """The pipeline saved in `directory`, without its own progress bar.

    Raises:
        HarmonicaError: there is no pipeline, or the dtype is unknown.
    """
    from diffusers import DiffusionPipeline

    if dtype not in DTYPES:
        raise HarmonicaError(f"dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    if not (directory / "model_index.json").is_file():
        raise HarmonicaError(f"{directory} holds no diffusers pipeline (no model_index.json in it)")
    load: Any = DiffusionPipeline.from_pretrained
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise HarmonicaError(f"device {device} is not known; choose cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HarmonicaError("this PyTorch finds no CUDA device; harmonica-rt doctor tells more")
    pipeline = load(str(directory)).to(device)
    if dtype != "fp32":
        pipeline = pipeline.to(DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_denoiser(directory: Path) -> nn.Module:
    """The denoiser of the pipeline saved in `directory`."""
    return denoiser_module(load_pipeline(directory))


def call_arguments(pipeline: Any, given: Sequence[str], steps: int, guidance: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's call: `name=value` pairs (values as JSON, else text) over sensible defaults.

    Raises:
        HarmonicaError: a pair without `=`, or an argument that the pipeline does not take.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if "class_labels" in known:
        arguments["class_labels"] = [0, 1]
    elif "prompt" in known:
        arguments["prompt"] = "a photo"
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator:
            raise HarmonicaError(f"--arg {pair}: expected name=value")
        if name not in known:
            raise HarmonicaError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {', '.join(known)}")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text
    return arguments
