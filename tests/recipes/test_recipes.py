"""Every recipe trains a small stand-in of its model by its own options, and what it leaves unsaid is the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from harmonica_rt import Schedule
from harmonica_rt.cli import app
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.recipes import known, read
from tests import tiny
from tests.recipes.test_uvit import uvit_pipeline

FEW = ["--steps", "4", "--iterations", "1", "--batch", "2", "--renew-every", "1"]
SMALL = [
    "--arg",
    "height=8",
    "--arg",
    "width=8",
    "--arg",
    "use_resolution_binning=false",
    "--arg",
    "max_sequence_length=8",
]
BUILD = {"dit": tiny.dit, "pixart": tiny.pixart_from_words, "u": uvit_pipeline}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for name, build in BUILD.items():
        torch.manual_seed(0)
        directories[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(directories[name])
    return directories


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def how_it_was_made(path: Path) -> Mapping[str, Any]:
    """The hyper-parameters that a schedule was learned with."""
    made_by = Schedule.load(path).made_by
    assert made_by is not None
    return made_by.hyper_parameters


# one for each sampler and each pipeline; the others differ from one of these in numbers
SOME = (
    "dit-xl-2-256-ddim-20",
    "pixart-alpha-256-iddpm-100",
    "pixart-alpha-256-sa-solver-25",
    "pixart-sigma-2048-dpm-solver++-20",
    "u-vit-h-2-256-dpm-solver-20",
)


@pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.exhaustive)
        for name in known()
        if read(name).model or name.startswith("u-vit")
    ],
)
def test_a_recipe_trains(stand_ins: dict[str, Path], tmp_path: Path, name: str) -> None:
    family = name.partition("-")[0]
    options: list[str | Path] = [*FEW]
    if family == "pixart":
        (tmp_path / "prompts.txt").write_text("a small cat\n")
        options += [*SMALL, "--prompts", tmp_path / "prompts.txt"]
    if "transformer" in read(name).options:  # the whole stand-in is the model's
        options += ["--transformer", stand_ins[family] / "transformer"]
    out = tmp_path / "schedule.json"
    result = run("train", stand_ins[family], out, "--recipe", name, *options)
    assert result.exit_code == 0, result.output
    schedule, recipe = Schedule.load(out), read(name)
    assert schedule.sampler is not None
    assert schedule.sampler.class_name == recipe.options["sampler"]
    assert schedule.guidance == recipe.options["guidance"]
    for argument in recipe.options.get("sampler_arg", []):
        field, _, value = argument.partition("=")
        assert str(schedule.sampler.config[field]) == value


def test_the_papers_method_can_be_added_to_a_recipe(stand_ins: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    recipes = ["--recipe", "dit-xl-2-256-ddim-20", "--recipe", "paper"]
    assert run("train", stand_ins["dit"], out, *recipes, *FEW).exit_code == 0
    how = how_it_was_made(out)
    assert (how["gates"], how["image_error"], how["coherence"], how["exchanges"]) == ("soft", "leave-one-out", 0.0, 0)
    assert how["target_cur"] == 0.375
    assert how["iterations"] == 1  # said on the command line


def test_another_target_replaces_that_of_the_recipe(stand_ins: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    recipe = ["--recipe", "dit-xl-2-256-ddim-20", "--target-speedup", "1.2"]
    assert run("train", stand_ins["dit"], out, *recipe, *FEW).exit_code == 0
    how = how_it_was_made(out)
    assert (how["target_speedup"], how["target_cur"]) == (1.2, None)


def test_bench_takes_a_recipe_without_its_training(stand_ins: dict[str, Path], tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.json"
    assert run("schedule", "make", stand_ins["dit"], schedule, "--steps", "4", "--every", "2").exit_code == 0
    result = run("bench", stand_ins["dit"], schedule, "--recipe", "dit-xl-2-256-ddim-20", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "theoretical" in result.output


def test_recipes_are_listed() -> None:
    result = run("recipes")
    assert result.exit_code == 0
    assert "facebook/DiT-XL-2-256" in result.output


def ascii_start(value: object) -> str:
    return ascii(value)[:60]


def test_names_that_cannot_be_files_are_refused(tmp_path: Path) -> None:
    for name in ("a\x00b", str(tmp_path), "x" * 5000, "\ud800"):
        with pytest.raises(HarmonicaError, match=r"recipe .*(cannot be read|no such file)"):
            read(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file, and no recipe of that name; there are dit-xl-2-256-ddim-10"),
        ("{", "expected a JSON object"),
        ('{"about": "", "model": null, "options": {}}', "train"),
        ('{"about": "", "model": null, "options": {"stpes": 4}, "train": {}}', "train has no option stpes"),
        ('{"about": "", "model": null, "options": [], "train": {}}', "must be JSON objects"),
        ('{"about": "", "model": 3, "options": {}, "train": {}}', "model text or null"),
        (
            '{"about": "", "about": "", "model": null, "options": {}, "train": {}}',
            "about: the field occurs more than once",
        ),
        ('{"about": "", "model": null, "options": {"guidance": NaN}, "train": {}}', "NaN is not JSON"),
        (
            '{"about": "", "model": null, "options": {"seed": 1%s}, "train": {}}' % ("0" * 4300),
            "a number of 4301 digits",
        ),
        ('{"about": "", "model": null, "options": {"arg": {}}, "train": {}}', "arg: expected text, a number"),
        ('{"about": "", "model": null, "options": {"arg": "a=1"}, "train": {}}', "arg: expected a list, got 'a=1'"),
        ('{"about": "", "model": null, "options": {}, "train": {"tau": [1]}}', "tau: expected one value, got [1]"),
        ('{"\\u001b[2J": 1}', "\\x1b[2J: unknown field"),
        ("[" * 100_000, "JSON nested too deep"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"about": "a\x00b"}', "not JSON, Invalid control character"),
    ],
    ids=ascii_start,
)
def test_a_malformed_recipe_is_refused(
    stand_ins: dict[str, Path], tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("train", stand_ins["dit"], tmp_path / "out.json", "--recipe", path, *FEW)
    assert isinstance(result.exception, HarmonicaError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "NoScheduler"], "no such scheduler"),
        (["--sampler-arg", "nonsense=1"], "DDIMScheduler has no field 'nonsense'"),
        (["--sampler-arg", "eta"], "expected name=value"),
        (["--sampler-arg", "prediction_type=7", "--sampler-arg", "beta_schedule=none"], "cannot be made"),
        (["--transformer", "nowhere/nothing/there"], "the denoiser in nowhere/nothing/there cannot be loaded"),
    ],
)
def test_unknown_samplers_and_denoisers_are_refused(
    stand_ins: dict[str, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    Schedule.every(2, steps=4, sites=["transformer_blocks.0.ff"]).save(tmp_path / "s.json")
    result = run("verify", stand_ins["dit"], tmp_path / "s.json", *options)
    assert isinstance(result.exception, HarmonicaError)
    assert message in str(result.exception)


def test_a_recipe_may_be_ones_own_file(stand_ins: dict[str, Path], tmp_path: Path) -> None:
    own = {"about": "mine", "model": None, "options": {"guidance": 1.0}, "train": {"target_cur": 0.4}}
    (tmp_path / "mine.json").write_text(json.dumps(own))
    out = tmp_path / "schedule.json"
    assert run("train", stand_ins["dit"], out, "--recipe", tmp_path / "mine.json", *FEW).exit_code == 0
    assert Schedule.load(out).guidance == 1.0
