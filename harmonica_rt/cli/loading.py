"""Loads pipelines and denoisers from local directories or the hub, as the command line chooses them."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt.cli import packages
from harmonica_rt.cli.calling import pairs
from harmonica_rt.cli.command import out_of_memory
from harmonica_rt.cli.console import debugging
from harmonica_rt.cli.options import one_of
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.pipelines.install import denoiser_module

_TRACE_HINT = re.compile(r"\s*\([^()]*(?:stack ?trace|traceback)[^()]*\)|[^.\n]*(?:stack ?trace|traceback)[^.\n]*\.?")
"""A parenthesis or a sentence that refers the reader to a stack trace."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PipelineChoice:
    """Which pipeline to load, and how.

    Attributes:
        model: the directory, or the id on the hub.
        transformer: directory or id of a denoiser that replaces the pipeline's.
        sampler: class of a scheduler that replaces the pipeline's and takes over its config.
        sampler_arguments: fields of the scheduler's config, `name=value`.
        dtype: dtype of all components, one of `DTYPES`.
        device: the device that they are moved to.
    """

    model: Path
    transformer: str | None = None
    sampler: str | None = None
    sampler_arguments: tuple[str, ...] = ()
    dtype: str = "fp32"
    device: str = "cpu"


def load_pipeline(choice: PipelineChoice) -> Any:
    """Load a pipeline from a directory or from the hub, and switch its own progress bar off.

    Raises:
        HarmonicaError: there is no such pipeline, it cannot be loaded, or an argument is unknown.
    """
    model, transformer = choice.model, choice.transformer
    one_of("--dtype", choice.dtype, list(DTYPES))
    place = _device(choice.device)
    local = (model / "model_index.json").is_file()
    if not local and (model.exists() or len(model.parts) != 2 or model.is_absolute()):
        what = "contains no diffusers pipeline (no model_index.json)" if model.is_dir() else "is not a directory"
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
        # A damaged file makes diffusers, transformers and the readers of their files raise errors of any type
        except Exception as error:
            if out_of_memory(error):
                raise
            absent = "" if local else f"there is no directory {model}, and "
            raise HarmonicaError(f"{absent}{what} cannot be loaded: {_message_of(error)}") from error
    if choice.sampler is not None or choice.sampler_arguments:
        pipeline.scheduler = _scheduler(pipeline.scheduler, choice.sampler, choice.sampler_arguments)
    pipeline = pipeline.to(place)
    if choice.dtype != "fp32":
        pipeline = pipeline.to(DTYPES[choice.dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_packages(index: Mapping[str, Any], what: str) -> None:
    """Raise HarmonicaError if a component of a pipeline belongs to a package that is missing.

    diffusers would raise an `AttributeError` that does not name the package.
    """
    for value in index.values():
        if isinstance(value, list) and value and isinstance(value[0], str) and (remedy := packages.missing(value[0])):
            raise HarmonicaError(f"{what} has components of {value[0]}: {remedy}")


def _message_of(error: Exception) -> str:
    """The message of an error; its cause replaces a hint at a stack trace, which is not shown."""
    if isinstance(error, ImportError) and (remedy := packages.remedy(error)):
        return remedy
    text = str(error) or "no reason given"
    kept = _TRACE_HINT.sub("", text)
    if kept != text and (cause := error.__cause__ or error.__context__) is not None:
        kept = f"{kept.strip()} ({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]})"
    plain = isinstance(error, OSError | ValueError | TypeError | AttributeError | ImportError)
    return kept if plain else f"{type(error).__name__}: {kept}"


def _scheduler(present: Any, sampler: str | None, given: Sequence[str]) -> Any:
    """A scheduler of the named class (by default the present one's), with the present config and the given fields."""
    import diffusers

    cls = type(present) if sampler is None else getattr(diffusers, sampler, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise HarmonicaError(f"--sampler {sampler}: diffusers has no such scheduler; they are named like DDIMScheduler")
    fields = pairs("--sampler-arg", given)
    known = inspect.signature(cls.__init__).parameters
    if unknown := [name for name in fields if name not in known]:
        raise HarmonicaError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(list(known)[1:])}")
    made: Any = cls
    try:
        return made.from_config(present.config, **fields)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise HarmonicaError(
            f"{cls.__name__} cannot be made from the config of {type(present).__name__}: {error} "
            "(--sampler-arg sets fields)"
        ) from error


def load_denoiser(model: Path) -> nn.Module:
    """The denoiser of a saved pipeline."""
    return denoiser_module(load_pipeline(PipelineChoice(model)))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:  # torch raises it for a malformed name
        raise HarmonicaError(f"device {name!r} is not known; choose cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HarmonicaError(f"device {name!r} is not supported; choose cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise HarmonicaError(f"there is no device {name}: PyTorch finds {count} CUDA devices; see harmonica-rt doctor")
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this block, diffusers and transformers log only errors and draw no progress bars."""
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
