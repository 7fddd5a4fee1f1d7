"""Pipelines and denoisers from local directories, and their arguments from the command line."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt.cli.console import debugging
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.runtime.pipelines import denoiser_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(directory: Path, dtype: str = "fp32", device: str = "cpu") -> Any:
    """The pipeline saved in `directory`, without its own progress bar.

    Raises:
        HarmonicaError: there is no pipeline, it cannot be loaded, or the dtype or the device is unknown.
    """
    if dtype not in DTYPES:
        raise HarmonicaError(f"dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    place = _device(device)
    if not (directory / "model_index.json").is_file():
        raise HarmonicaError(f"{directory} holds no diffusers pipeline (no model_index.json in it)")
    with nullcontext() if debugging() else _quiet():
        from diffusers import DiffusionPipeline

        load: Any = DiffusionPipeline.from_pretrained
        try:
            pipeline = load(str(directory))
        # a file that is missing or damaged, contents of a wrong value or type, a class or a package that is not there
        except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise HarmonicaError(f"the pipeline in {directory} cannot be loaded: {error}") from error
    pipeline = pipeline.to(place)
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
    known = [name for name in inspect.signature(type(pipeline).__call__).parameters if name != "self"]
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
        if name == "generator":
            raise HarmonicaError(f"--arg {pair}: generators are made from --seed")
        if name not in known:
            raise HarmonicaError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {', '.join(known)}")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text
    return arguments


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:  # torch's word for a malformed name
        raise HarmonicaError(f"device {name!r} is not known; choose cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HarmonicaError(f"device {name!r} is not supported; choose cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise HarmonicaError(f"there is no device {name}: PyTorch finds {count} CUDA devices; see harmonica-rt doctor")
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this block diffusers and transformers tell errors only, and draw no progress bars."""
    with ExitStack() as restore:
        for name in ("diffusers", "transformers"):
            if find_spec(name) is None:
                continue  # diffusers works without transformers
            voice: Any = import_module(f"{name}.utils.logging")
            level = voice.get_verbosity()
            restore.callback(voice.set_verbosity, level)
            voice.set_verbosity(max(level, logging.ERROR))
            if voice.is_progress_bar_enabled():
                restore.callback(voice.enable_progress_bar)
                voice.disable_progress_bar()
        yield
