"""Plans written to a file and read in another process's place: nothing is captured again, nothing stale is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.errors import HarmonicaError, PlanFileError
from harmonica_rt.runtime import planned
from tests.models import Stack, stack, stack_call
from tests.tiny import families, random_schedule, sample

STEPS = 4
FAMILIES = families()


def outputs(compiled: Any) -> list[torch.Tensor]:
    compiled.reset()
    return [compiled(**stack_call(step)) for step in range(STEPS)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = stack()
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    outputs(compiled)
    compiled.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize("lowering", ["plain", "fused"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_loaded_pipeline_gives_the_same_images(
    name: str, lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    pipeline = family.build()
    pipeline.set_progress_bar_config(disable=True)
    hrt.compile(pipeline, random_schedule(pipeline.transformer, STEPS), lowering=lowering, strict=True)
    expected = sample(pipeline, STEPS, **family.guided)
    report = hrt.get_compiled(pipeline).report()
    hrt.get_compiled(pipeline).save(tmp_path / "plan.json")
    torch.manual_seed(0)
    again = family.build()
    again.set_progress_bar_config(disable=True)
    monkeypatch.setattr(planned, "capture", None)
    assert hrt.load(tmp_path / "plan.json", again, strict=True) is again
    assert (sample(again, STEPS, **family.guided) == expected).all()
    restored = hrt.get_compiled(again).report()
    assert [plan.arena_bytes for plan in restored.plans] == [plan.arena_bytes for plan in report.plans]
    assert [plan.fusions for plan in restored.plans] == [plan.fusions for plan in report.plans]
    assert [plan.steps for plan in restored.plans] == [plan.steps for plan in report.plans]


def test_the_file_holds_no_weights_and_other_values_of_them_are_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "capture", None)
    model = stack(seed=1)
    compiled = hrt.load(saved, model, strict=True)
    assert compiled.schedule == random_schedule(model, STEPS)
    truth = hrt.reference(model, compiled.schedule)
    for got, expected in zip(outputs(compiled), outputs(truth), strict=True):
        torch.testing.assert_close(got, expected)
    assert saved.stat().st_size < 100_000


def test_another_signature_is_captured(saved: Path) -> None:
    model = stack()
    compiled = hrt.load(saved, model, strict=True)
    compiled.reset()
    compiled(**stack_call(0, tokens=6))
    assert len(compiled.report().plans) == 2


class Scaled(Stack):
    """Of another class."""


@pytest.mark.parametrize(
    "other",
    [lambda: stack(depth=4), lambda: stack().double(), lambda: Scaled().eval()],
    ids=["depth", "dtype", "class"],
)
def test_another_model_is_refused(saved: Path, other: Any) -> None:
    with pytest.raises(PlanFileError, match="made for another"):
        hrt.load(saved, other())


def test_a_changed_attribute_is_refused(saved: Path) -> None:
    model = stack()
    model.blocks[0].mlp[1].approximate = "tanh"
    with pytest.raises(PlanFileError, match="made for another Stack"):
        hrt.load(saved, model)


def test_training_mode_is_refused(saved: Path) -> None:
    with pytest.raises(HarmonicaError):
        hrt.load(saved, stack().train())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "zip"}, "not a saved plan"),
        ({"version": 2}, "version 2"),
        ({"torch": "1.0"}, "made with torch 1.0"),
        ({"plans": [{}]}, "damaged"),
        ({"schedule": {}}, "damaged"),
        ({"lowering": "none"}, "lowering"),
    ],
)
def test_bad_files_are_clear_errors(saved: Path, change: dict[str, Any], message: str) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **change}))
    with pytest.raises(HarmonicaError, match=message):
        hrt.load(saved, stack())


@pytest.mark.parametrize("content", [None, b"\xff", b"{", b"[]"])
def test_no_plan_file_at_all(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(PlanFileError, match=r"x\.json"):
        hrt.load(tmp_path / "x.json", stack())


def test_overlapping_slots_are_found(saved: Path) -> None:
    document = json.loads(saved.read_text())
    document["plans"][0]["slot_offsets"] = [0] * len(document["plans"][0]["slot_offsets"])
    saved.write_text(json.dumps(document))
    with pytest.raises(PlanFileError, match="damaged"):
        hrt.load(saved, stack())


def test_nothing_to_save_yet(tmp_path: Path) -> None:
    model = stack()
    with pytest.raises(HarmonicaError, match="no plan to save yet"):
        hrt.compile(model, random_schedule(model, STEPS)).save(tmp_path / "plan.json")
