"""`harmonica-rt sites` and `harmonica-rt schedule`: schedules made, shown, drawn and converted."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from harmonica_rt import Schedule
from harmonica_rt.schedule import ScheduleSet
from tests.cli.running import STEPS, run


def test_sites(model: Path) -> None:
    result = run("sites", model)
    assert result.stdout.splitlines()[:2] == ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    assert "4 sites of DiTTransformer2DModel: 2 attn1, 2 ff" in result.output
    only = run("sites", model, "--pattern", "transformer_blocks.*.ff")
    assert "2 sites of DiTTransformer2DModel: 2 ff" in only.output
    spans = run("sites", model, "--level", "span")
    assert "transformer_blocks[0:2]" in spans.output.splitlines()
    assert "level is one of 'sublayer', 'block', 'span', 'output'" in str(run("sites", model, "--level", "x").exception)


def test_schedule_made_shown_and_drawn(schedule: Path, tmp_path: Path) -> None:
    made = Schedule.load(schedule)
    assert (made.steps, made.cur) == (4, 0.5)
    assert made.model is not None
    assert made.model.class_name == "DiTTransformer2DModel"
    shown = run("schedule", "show", schedule)
    assert "4 steps x 4 sites, CUR 50.00%" in shown.output
    assert run("schedule", "plot", schedule, tmp_path / "heat.png").exit_code == 0
    assert matplotlib.image.imread(tmp_path / "heat.png").shape[0] > 100


def test_weights_are_fitted(model: Path, schedule: Path, tmp_path: Path) -> None:
    out = tmp_path / "fitted.json"
    fitted = run("schedule", "fit", model, schedule, out, "--runs", "2", "--arg", "class_labels=[3]", "--guidance", "2")
    assert fitted.exit_code == 0
    assert "of that of plain reuse" in fitted.output
    made = Schedule.load(out)
    assert made.weights_by is not None
    assert made.weights_by.hyper_parameters["samples"] == 4  # two calls, two halves of guidance
    assert made.compute.tolist() == Schedule.load(schedule).compute.tolist()
    wrong = run("schedule", "fit", model, schedule, out, "--arg", "class_labels=[77777]")
    assert "failed when called with num_inference_steps=4" in str(wrong.exception)


def test_weights_are_shown(tmp_path: Path) -> None:
    Schedule.every(2, steps=4, sites=["blocks.0.ff"]).with_taylor().save(tmp_path / "s.json")
    shown = run("schedule", "show", tmp_path / "s.json")
    assert "weights     up to 2 per entry, 1 of 2 reused entries, made by taylor" in shown.output
    assert "   3  2  100.0%  1.5 -0.5" in shown.output


@pytest.mark.parametrize(
    ("options", "rows"),
    [(["--every", "2"], ["1111", "0000"] * 2), (["--mask", "1101"], ["1111", "1111", "0000", "1111"])],
    ids=["every", "mask"],
)
def test_schedule_make(model: Path, tmp_path: Path, options: list[str], rows: list[str]) -> None:
    path = tmp_path / "made.json"
    assert run("schedule", "make", model, path, "--steps", STEPS, *options).exit_code == 0
    assert json.loads(path.read_text())["compute"] == rows


def test_schedule_make_with_chosen_sites(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    made = run("schedule", "make", model, path, "--every", 2, "--pattern", "*.0.ff", "--pattern", "*.1.attn1")
    assert made.exit_code == 0, made.exception
    assert Schedule.load(path).sites == ("transformer_blocks.0.ff", "transformer_blocks.1.attn1")
    assert Schedule.load(path).steps == 20
    assert "matches" in str(run("schedule", "make", model, path, "--every", 2, "--pattern", "nothing").exception)


@pytest.mark.parametrize(("steps", "works"), [(["--steps", 3], False), (["--steps", 4], True), ([], True)])
def test_a_mask_and_steps_that_contradict_it(model: Path, tmp_path: Path, steps: list[object], works: bool) -> None:
    result = run("schedule", "make", model, tmp_path / "x.json", "--mask", "1101", *steps)
    assert (result.exit_code == 0) is works
    assert works or "--mask has 4 entries, one per step, but --steps is 3" in str(result.exception)
    assert (tmp_path / "x.json").exists() is works


def test_a_directory_with_a_schedule_is_one(model: Path, schedule: Path, tmp_path: Path) -> None:
    Schedule.load(schedule).save_pretrained(tmp_path / "folder")
    assert "4 steps x 4 sites" in run("schedule", "show", tmp_path / "folder").output
    assert "parity ok" in run("verify", model, tmp_path / "folder").output


def test_a_router_in_the_place_of_a_schedule_is_named_as_one(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "router.pt")
    assert "`harmonica-rt schedule convert` makes" in str(run("schedule", "show", tmp_path / "router.pt").exception)


def test_schedule_make_wants_one_method(model: Path, tmp_path: Path) -> None:
    result = run("schedule", "make", model, tmp_path / "x.json", "--every", 2, "--random", 0.5)
    assert "give exactly one of --every" in str(result.exception)


def test_schedule_convert(tmp_path: Path) -> None:
    logits = torch.full((2 * 3,), 5.0)
    routers = {f"{step}.prob": logits.clone() for step in range(4)}
    routers["0.prob"][1] = -5.0  # the last step reuses the first MLP
    torch.save({"routers": routers, "opt": {}, "args": None}, tmp_path / "router.pt")
    path = tmp_path / "out.json"
    result = run("schedule", "convert", tmp_path / "router.pt", path, "--kind", "harmonica")
    assert result.exit_code == 0, result.exception
    assert json.loads(path.read_text())["compute"] == ["111111"] * 3 + ["101111"]
    unknown = run("schedule", "convert", tmp_path / "router.pt", path, "--kind", "mine")
    assert "--kind mine is not known" in str(unknown.exception)


@pytest.fixture(params=["file", "folder"])
def several(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A set of schedules for 4 and 6 steps."""
    made = ScheduleSet(Schedule.every(2, steps=steps, sites=["blocks.0.ff"]) for steps in (4, 6))
    if request.param == "file":
        made.save(tmp_path / "set.json")
        return tmp_path / "set.json"
    (tmp_path / "set").mkdir()
    for schedule in made.schedules:
        schedule.save(tmp_path / "set" / f"{schedule.steps}.json")
    return tmp_path / "set"


def test_a_set_is_shown_whole_or_for_some_steps(several: Path, tmp_path: Path) -> None:
    whole = run("schedule", "show", several).output
    assert whole.index("4 steps x 1 sites") < whole.index("6 steps x 1 sites")
    one = run("schedule", "show", several, "--steps", 6).output
    assert "6 steps x 1 sites" in one
    assert "4 steps" not in one
    assert "10 steps x 1 sites, CUR 50.00%" in run("schedule", "show", several, "--steps", 10).output
    refused = run("schedule", "plot", several, tmp_path / "heat.png")
    assert "has schedules for 4 and 6 steps, and one is needed: give --steps" in str(refused.exception)
    assert run("schedule", "plot", several, tmp_path / "heat.png", "--steps", 5).exit_code == 0
    assert (tmp_path / "heat.png").is_file()
