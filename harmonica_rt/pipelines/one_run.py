"""One call of a pipeline with another denoiser, after which the pipeline and the random numbers are as before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from harmonica_rt.changes import Changes
from harmonica_rt.pipelines.install import put_temporarily
from harmonica_rt.sampling.denoiser import Denoiser


def run_once(pipeline: Any, denoiser: Denoiser, seed: int, arguments: Mapping[str, Any]) -> Any:
    """Call the pipeline with `denoiser` in it, and return what the pipeline does.

    Args:
        pipeline: the pipeline; what was installed in it before is put back, also after an error or an interruption.
        denoiser: runs in the place of the pipeline's own.
        seed: seeds the call, unless `arguments` have a generator. Generators in `arguments` are left advanced.
        arguments: the keyword arguments of the call.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # some pipelines draw from torch's own generator even if they are given another one
    changes = Changes()
    with changes, changes, torch.random.fork_rng(gpus):
        changes.undone_by(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        put_temporarily(pipeline, denoiser, changes)
        torch.manual_seed(seed)
        arguments, taken = dict(arguments), inspect.signature(type(pipeline).__call__).parameters
        if "generator" in taken:
            arguments.setdefault("generator", torch.Generator("cpu").manual_seed(seed))
        if "output_type" in taken:
            arguments.setdefault("output_type", "np")
        return pipeline(**arguments)
