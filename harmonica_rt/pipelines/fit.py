"""Checks that a schedule fits the model and the pipeline that it is to run on."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from harmonica_rt.errors import ArgumentError, ScheduleMismatchError, SiteError
from harmonica_rt.schedule import ModelInfo, Schedule, ScheduleSet
from harmonica_rt.schedule.sites import check_sites

log = logging.getLogger(__name__)


def model_info(model: nn.Module) -> ModelInfo:
    """Class name and config fingerprint of a model, to record in a schedule.

    Raises:
        ArgumentError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        remedy = "; pass its denoiser: model_info(pipe.transformer)" if hasattr(model, "scheduler") else ""
        raise ArgumentError(f"model_info takes an nn.Module, got an object of class {type(model).__name__}{remedy}")
    return ModelInfo.of(model)


def check_fit(model: nn.Module, schedule: Schedule | ScheduleSet) -> None:
    """Raise ScheduleMismatchError if a schedule was made for another model, or names sites that this one lacks."""
    for each in ScheduleSet.of(schedule).schedules:
        _check_fit(model, each)


def _check_fit(model: nn.Module, schedule: Schedule) -> None:
    info, wanted = model_info(model), schedule.model
    if wanted is not None and wanted.class_name != info.class_name:
        raise ScheduleMismatchError(f"the schedule was made for a {wanted.class_name}, this is a {info.class_name}")
    try:
        check_sites(model, schedule.sites)
    except SiteError as error:
        raise ScheduleMismatchError(str(error)) from error
    if wanted is not None and wanted.config_fingerprint not in (None, info.config_fingerprint):
        raise ScheduleMismatchError(
            f"the schedule was made for a {wanted.class_name} with another config ({wanted.config_fingerprint}, this "
            f"one is {info.config_fingerprint}). To use it anyway, drop its record of the model: "
            "dataclasses.replace(schedule, model=None)"
        )


def warn_about_sampler(pipeline: Any, schedule: Schedule | ScheduleSet) -> None:
    """Warn if a pipeline samples with a different scheduler class than the schedule was made for."""
    name = type(pipeline.scheduler).__name__
    samplers = [each.sampler for each in ScheduleSet.of(schedule).schedules if each.sampler is not None]
    for other in dict.fromkeys(sampler.class_name for sampler in samplers if sampler.class_name != name):
        log.warning(
            "the schedule was made for %s and this pipeline samples with %s: parity holds, but images may be worse",
            other,
            name,
        )
