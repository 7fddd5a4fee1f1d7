"""The schedule that comes with the bundled model: learned for it, by the command that the Makefile has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import harmonica_rt as hrt
from harmonica_rt.demo import bundled_model, bundled_schedule


def test_the_bundled_schedule_is_for_the_bundled_model() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = hrt.Schedule.load(bundled_schedule())
    model = diffusers.DiTTransformer2DModel.from_pretrained(str(bundled_model()), subfolder="transformer")
    assert list(schedule.sites) == hrt.find_sites(model)
    assert schedule.model == hrt.model_info(model)
    assert schedule.guidance == 2.0


def test_the_bundled_schedule_was_made_by_the_makefiles_command() -> None:
    made_by = hrt.Schedule.load(bundled_schedule()).made_by
    assert made_by is not None
    assert made_by.method == "harmonica"
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = makefile[makefile.index("train-schedule:") :].partition("\n\n")[0]
    options = dict(re.findall(r"--([a-z-]+) ([\d.]+)", recipe))
    assert len(options) == 7
    for name, value in options.items():
        assert made_by.hyper_parameters[name.replace("-", "_")] == float(value)
