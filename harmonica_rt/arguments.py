"""Checks of the public functions' arguments, made before anything else is done.

Each check says what was expected, what was given and what to do, in the caller's terms: if a wrong argument failed
further inside, the message would be about something that the caller never wrote.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import nn

from harmonica_rt.errors import ArgumentError
from harmonica_rt.parity.lockstep import Tolerance
from harmonica_rt.pipelines.install import is_pipeline
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.untrusted.text import described


def check_schedule(given: object) -> None:
    """Raise ArgumentError unless `given` is a schedule or a set of schedules."""
    if isinstance(given, Schedule | ScheduleSet):
        return
    remedy = "Schedule.load(path) reads one; Schedule.every(2, steps=20, sites=hrt.find_sites(model)) makes one"
    if given is Schedule:
        remedy = "create one, as with Schedule.every(2, steps=20, sites=hrt.find_sites(model))"
    elif isinstance(given, str | os.PathLike):
        remedy = f"read it first: Schedule.load({os.fspath(given)!r})"
    elif isinstance(given, nn.Module) or is_pipeline(given):
        remedy = "the model or pipeline comes first, the schedule second"
    elif isinstance(given, Mapping):
        remedy = "one schedule at a time; Schedule.load(path) reads the JSON of a file"
    elif isinstance(given, list | tuple) and given and all(isinstance(each, Schedule) for each in given):
        remedy = "ScheduleSet(schedules) makes a set of schedules for several numbers of steps"
    elif isinstance(getattr(given, "schedule", None), Schedule | ScheduleSet):
        remedy = "it holds one: pass its `.schedule`"
    elif hasattr(given, "__array__"):
        remedy = "Schedule.from_array(mask, sites) makes one from a mask"
    raise ArgumentError(f"expected a harmonica_rt.Schedule, got {described(given)}; {remedy}")


def check_subject(given: object) -> None:
    """Raise ArgumentError unless `given` is a model or a pipeline."""
    if isinstance(given, nn.Module):
        return
    if is_pipeline(given):
        if not (type(given).__weakrefoffset__ and hasattr(given, "__dict__")):
            raise ArgumentError(
                f"{described(given)} allows no weak references or has no __dict__, and both are needed to follow its "
                "scheduler; put the model and the scheduler into an object of a class of your own, as `transformer` "
                "and `scheduler`"
            )
        return
    remedy = "pass the model, or a pipeline that has a scheduler"
    if getattr(given, "scheduler", given) is None:
        remedy = "its scheduler is None, and the steps of a pipeline are followed through its scheduler"
    elif isinstance(given, type):
        remedy = f"create an object, as with {given.__name__}.from_pretrained(...)"
    elif isinstance(given, Schedule | ScheduleSet):
        remedy = "the model or pipeline comes first, the schedule second"
    elif isinstance(given, str | os.PathLike):
        remedy = f"load it first: DiffusionPipeline.from_pretrained({os.fspath(given)!r})"
    elif isinstance(given, Mapping | Iterable):
        remedy = "pass one model or pipeline at a time"
    raise ArgumentError(f"expected an nn.Module or a diffusers pipeline, got {described(given)}; {remedy}")


def check_pipeline(given: object) -> None:
    """Raise ArgumentError unless `given` is a pipeline."""
    check_subject(given)
    if isinstance(given, Denoiser):
        raise ArgumentError(
            f"expected a pipeline, got {described(given)}, a compiled model without a pipeline: call its own "
            "report() and save(); its `model` is the plain model, unchanged"
        )
    if isinstance(given, nn.Module):
        raise ArgumentError(f"expected a pipeline, got {described(given)}; pass the pipeline that was compiled")


def check_seed(given: object) -> None:
    """Raise ArgumentError unless `given` is an int (a bool does not count)."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise ArgumentError(f"seed must be a whole number, got {described(given)}")


def check_tolerance(given: object) -> None:
    """Raise ArgumentError unless `given` is the name of a tolerance: numbers are measured, not chosen."""
    if not isinstance(given, str) or given not in get_args(Tolerance):
        names = ", ".join(get_args(Tolerance))
        raise ArgumentError(
            f"tolerance must be one of {names}, got {described(given)}; `measured` finds the number itself"
        )


def check_path(given: object) -> None:
    """Raise ArgumentError unless `given` names a file."""
    if isinstance(given, str | os.PathLike) and os.fspath(given):
        return
    remedy = ""
    if isinstance(given, nn.Module) or is_pipeline(given):
        remedy = "; the path comes first, the model or pipeline second"
    elif isinstance(given, Schedule | ScheduleSet):
        remedy = "; a schedule goes to compile(model_or_pipeline, schedule)"
    raise ArgumentError(f"expected the path of a file, got {described(given)}{remedy}")


def checked_calls(given: object, steps: Sequence[int] | None) -> list[Mapping[str, Any]]:
    """The calls for `verify(model, ...)`, one mapping of keyword arguments per step.

    Args:
        given: what the caller gave.
        steps: the numbers of steps that there are schedules for; None: any number will do.

    Raises:
        ArgumentError: not a list of mappings, or not as many as a schedule has steps.
    """
    expected = "calls=[...] holds the keyword arguments of one call per step, as a list of dicts"
    if given is None:
        raise ArgumentError(f"verify(model, schedule) needs calls: {expected}")
    calls = list_of_calls(given, expected)
    if steps is not None and len(calls) not in steps:
        have = f"schedule has {steps[0]}" if len(steps) == 1 else f"schedules have {', '.join(map(str, steps))}"
        raise ArgumentError(f"calls holds {len(calls)} calls, the {have} steps: pass one per step")
    return calls


def list_of_calls(given: object, expected: str) -> list[Mapping[str, Any]]:
    """The keyword arguments of calls; ArgumentError, with what is `expected`, unless they are a list of mappings."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ArgumentError(f"{expected}; got {described(given)}")
    calls = list(given)
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
            raise ArgumentError(f"{expected}; call {index} is {described(call)}")
    return calls


def check_pipeline_arguments(pipeline: Any, given: Mapping[str, Any], function: str = "verify") -> None:
    """Raise ArgumentError unless the pipeline can be called with these keyword arguments, as `function` does."""
    name = type(pipeline).__name__
    if not callable(pipeline):
        raise ArgumentError(
            f"{function} calls the pipeline, and a {name} cannot be called; {function} its model: "
            f"{function}(model, calls=[...])"
        )
    signature = inspect.signature(type(pipeline).__call__)
    parameters = signature.parameters.values()
    unknown = [argument for argument in given if argument not in signature.parameters]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        near = difflib.get_close_matches(unknown[0], signature.parameters, 1)
        raise ArgumentError(
            f"{function} calls the pipeline, and {name} takes no {unknown[0]}"
            + (f"; it takes {near[0]}" if near else "")
        )
    try:
        signature.bind(pipeline, **given)
    except TypeError as error:
        raise ArgumentError(
            f"{function} calls the pipeline, and {name} cannot be called like this: {error}. Pass what you pass to the "
            "pipeline, by name, num_inference_steps included"
        ) from error
