"""Compiles Diffusion Transformers with cached features: `compile` a pipeline with a `Schedule`, and call it as before.

Importing this package is cheap: a name's module, and with it torch or diffusers, is imported at the name's first use.

Reading order: docs/how-it-works.md follows one call through the folders; each folder's `__init__` says what it is for.
Files beside the folders belong to no stage:

- used everywhere: `errors`, `options`, `indices` (types of step, site and slot numbers), `changes` (temporary changes
  that are undone after any interruption), `torch_state`, `wrappers` (the model inside torch.compile's, peft's or DDP's
  wrapper), `version`;
- `engine`, the interface between `sampling`, which says to which step a call belongs, and what computes the call;
  `reference_engine` is its simplest implementation, and the truth for `parity`;
- used by `api` and `backend`: `arguments` (checks), `report` and `plan_report` (what `report()` returns).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from harmonica_rt.version import __version__

if TYPE_CHECKING:
    from harmonica_rt.api import (
        CompiledModel,
        compile,
        fit,
        get_compiled,
        load,
        reference,
        uncompile,
        verify,
    )
    from harmonica_rt.backend import attach
    from harmonica_rt.demo import demo_pipeline, demo_schedule
    from harmonica_rt.errors import CaptureError, HarmonicaError
    from harmonica_rt.execute.planned_engine import FallbackWarning
    from harmonica_rt.parity.report import ParityError, ParityReport
    from harmonica_rt.pipelines.fit import model_info
    from harmonica_rt.schedule import OUTPUT, Schedule, ScheduleSet, find_sites

_HOME = {
    "CompiledModel": "harmonica_rt.api",
    "compile": "harmonica_rt.api",
    "fit": "harmonica_rt.api",
    "get_compiled": "harmonica_rt.api",
    "load": "harmonica_rt.api",
    "model_info": "harmonica_rt.pipelines.fit",
    "reference": "harmonica_rt.api",
    "uncompile": "harmonica_rt.api",
    "verify": "harmonica_rt.api",
    "attach": "harmonica_rt.backend",
    "CaptureError": "harmonica_rt.errors",
    "demo_pipeline": "harmonica_rt.demo",
    "demo_schedule": "harmonica_rt.demo",
    "FallbackWarning": "harmonica_rt.execute.planned_engine",
    "HarmonicaError": "harmonica_rt.errors",
    "ParityError": "harmonica_rt.parity.report",
    "ParityReport": "harmonica_rt.parity.report",
    "OUTPUT": "harmonica_rt.schedule",
    "Schedule": "harmonica_rt.schedule",
    "ScheduleSet": "harmonica_rt.schedule",
    "find_sites": "harmonica_rt.schedule",
}

__all__ = [
    "OUTPUT",
    "CaptureError",
    "CompiledModel",
    "FallbackWarning",
    "HarmonicaError",
    "ParityError",
    "ParityReport",
    "Schedule",
    "ScheduleSet",
    "__version__",
    "attach",
    "compile",
    "demo_pipeline",
    "demo_schedule",
    "find_sites",
    "fit",
    "get_compiled",
    "load",
    "model_info",
    "reference",
    "uncompile",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
