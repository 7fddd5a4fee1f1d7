"""Pipelines and denoisers from local directories, and their arguments from the command line."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt.cli import packages
from harmonica_rt.cli.command import out_of_memory
from harmonica_rt.cli.console import debugging
from harmonica_rt.cli.options import one_of
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.pipelines.install import denoiser_module

_REFERENCE = re.compile(r"\s*\([^()]*(?:stack ?trace|traceback)[^()]*\)|[^.\n]*(?:stack ?trace|traceback)[^.\n]*\.?")
"""A parenthesis or a sentence that sends the reader to a stack trace."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(
    model: Path,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    transformer: str | None = None,
    sampler: str | None = None,
    sampler_arguments: Sequence[str] = (),
) -> Any:
    """The pipeline saved in a directory or on the hub, without its own progress bar.

    Args:
        model: the directory, or the id on the hub.
        dtype: of all components.
        device: where to.
        transformer: directory or id of a denoiser in the place of the pipeline's.
        sampler: class of a scheduler in the place of the pipeline's, with its config.
        sampler_arguments: fields of the scheduler's config, `name=value`.

    Raises:
        HarmonicaError: there is no pipeline, it cannot be loaded, or an argument is unknown.
    """
    one_of("--dtype", dtype, list(DTYPES))
    place = _device(device)
    local = (model / "model_index.json").is_file()
    if not local and (model.exists() or len(model.parts) != 2 or model.is_absolute()):
        what = "holds no diffusers pipeline (no model_index.json in it)" if model.is_dir() else "is no directory"
        raise HarmonicaError(f"{model} {what}; give a directory that a pipeline was saved in, or its id on the hub")
    with nullcontext() if debugging() else _quiet():
        from diffusers import AutoModel, DiffusionPipeline

        load: Any = DiffusionPipeline.from_pretrained
        what = f"the pipeline in {model}"
        try:
            directory = str(model) if local else DiffusionPipeline.download(str(model))
            _check_packages(DiffusionPipeline.load_config(directory), what)
            components = {}
            if transformer is not None:
                what = f"the denoiser in {transformer}"
                within = "transformer" if not (Path(transformer) / "config.json").is_file() else None
                components["transformer"] = AutoModel.from_pretrained(transformer, subfolder=within)
                what = f"the pipeline in {model}"
            pipeline = load(directory, **components)
        except HarmonicaError:
            raise
        # What a damaged file brings about in diffusers, transformers and the readers of their files has no end of types
        except Exception as error:
            if out_of_memory(error):
                raise
            absent = "" if local else f"there is no directory {model}, and "
            raise HarmonicaError(f"{absent}{what} cannot be loaded: {_said(error)}") from error
    if sampler is not None or sampler_arguments:
        pipeline.scheduler = _scheduler(pipeline.scheduler, sampler, sampler_arguments)
    pipeline = pipeline.to(place)
    if dtype != "fp32":
        pipeline = pipeline.to(DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_packages(index: Mapping[str, Any], what: str) -> None:
    """Raise HarmonicaError where a component of a pipeline is of a package that is missing.

    diffusers stumbles over it with an `AttributeError` that names nothing.
    """
    for value in index.values():
        if isinstance(value, list) and value and isinstance(value[0], str) and (told := packages.missing(value[0])):
            raise HarmonicaError(f"{what} has components of {value[0]}: {told}")


def _said(error: Exception) -> str:
    """What an error says; in the place of a stack trace that it refers to and nobody sees, what caused it."""
    if isinstance(error, ImportError) and (told := packages.remedy(error)):
        return told
    text = str(error) or "no reason given"
    kept = _REFERENCE.sub("", text)
    if kept != text and (cause := error.__cause__ or error.__context__) is not None:
        kept = f"{kept.strip()} ({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]})"
    plain = isinstance(error, OSError | ValueError | TypeError | AttributeError | ImportError)
    return kept if plain else f"{type(error).__name__}: {kept}"


@contextmanager
def calling(pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within this block what the pipeline raises for arguments that it cannot take becomes a HarmonicaError.

    Args:
        pipeline: what is called.
        arguments: of its call.
    """
    try:
        yield
    except HarmonicaError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise HarmonicaError(
            f"{type(pipeline).__name__} failed when called with {given}: {type(error).__name__}: {error} "
            "(`harmonica-rt --debug ...` shows where it failed)"
        ) from error


def _scheduler(present: Any, sampler: str | None, given: Sequence[str]) -> Any:
    """The scheduler of the named class (default: the present one's) with the present config and the given fields."""
    import diffusers

    cls = type(present) if sampler is None else getattr(diffusers, sampler, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise HarmonicaError(f"--sampler {sampler}: diffusers has no such scheduler; they are named like DDIMScheduler")
    fields = _pairs("--sampler-arg", given)
    known = inspect.signature(cls.__init__).parameters
    if unknown := [name for name in fields if name not in known]:
        raise HarmonicaError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(list(known)[1:])}")
    made: Any = cls
    try:
        return made.from_config(present.config, **fields)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise HarmonicaError(
            f"{cls.__name__} cannot be made of the config of {type(present).__name__}: {error} "
            "(--sampler-arg sets fields)"
        ) from error


def load_denoiser(model: Path) -> nn.Module:
    """The denoiser of a saved pipeline."""
    return denoiser_module(load_pipeline(model))


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
    pairs = _pairs("--arg", given)
    if guidance is not None:
        if "guidance_scale" in pairs:
            raise HarmonicaError("--guidance and --arg guidance_scale=... say the same; give one of them")
        arguments["guidance_scale"] = guidance
    for name, value in pairs.items():
        if name == "generator":
            raise HarmonicaError(f"--arg {name}: generators are made from --seed")
        if name not in known:
            raise HarmonicaError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {', '.join(known)}")
        arguments[name] = value
    return arguments


def _pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; values as JSON, else as text."""
    pairs: dict[str, Any] = {}
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator:
            raise HarmonicaError(f"{option} {pair}: expected name=value")
        try:
            pairs[name] = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or nested or long beyond what json reads
            pairs[name] = text
    return pairs


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
