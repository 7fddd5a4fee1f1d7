"""Plans written to a file and read in another process's place: nothing is captured again, nothing stale is run."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.capture import captures
from harmonica_rt.errors import ArgumentError, HarmonicaError, PlanFileError, ScheduleMismatchError
from harmonica_rt.schedule import ScheduleSet
from tests.models import Stack, stack, stack_call
from tests.planfile.forged import forge
from tests.tiers import member
from tests.tiny import families, random_schedule, sample, shallow

STEPS = 4
FAMILIES = {**families(), "sd3": shallow("sd3"), "flux": shallow("flux")}


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


# A file holds the captured graph and the name of the lowering: `make test` stores each name, and the operators of each
# transformer (both families of PixArt have the same one).
FAMILIES_AND_LOWERINGS = [
    member(
        *(name, lowering),
        id=f"{name}-{lowering}",
        always=(lowering == "fused" and name != "pixart-sigma") or (name, lowering) == ("dit", "plain"),
    )
    for name, lowering in itertools.product(FAMILIES, ["plain", "fused"])
]


@pytest.mark.parametrize(("name", "lowering"), FAMILIES_AND_LOWERINGS)
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
    monkeypatch.setattr(captures, "capture_model", None)
    assert hrt.load(tmp_path / "plan.json", again, strict=True) is again
    assert (sample(again, STEPS, **family.guided) == expected).all()
    restored = hrt.get_compiled(again).report()
    assert [plan.memory.arena_bytes for plan in restored.plans] == [plan.memory.arena_bytes for plan in report.plans]
    assert [plan.fusion for plan in restored.plans] == [plan.fusion for plan in report.plans]
    assert [plan.steps for plan in restored.plans] == [plan.steps for plan in report.plans]


def test_the_file_holds_no_weights_and_other_values_of_them_are_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "capture_model", None)
    model = stack(seed=1)
    compiled = hrt.load(saved, model, strict=True)
    assert compiled.schedule == random_schedule(model, STEPS)
    truth = hrt.reference(model, compiled.schedule)
    for got, expected in zip(outputs(compiled), outputs(truth), strict=True):
        torch.testing.assert_close(got, expected)
    assert saved.stat().st_size < 100_000


def test_the_log_says_that_it_was_loaded(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="harmonica_rt"):
        hrt.load(saved, stack())
    told = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("loaded the plan of Stack for ") for message in told)
    assert not any("planned" in message for message in told)


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
        ({"version": 1}, "version 1"),
        ({"version": True}, "version True"),
        ({"torch": "1.0"}, "made with torch '1.0'"),
        ({"harmonica_rt": "0.0"}, "made with harmonica_rt '0.0'"),
        ({"plans": [{}]}, r"plans\[0\]: expected the fields steps, signature, roles"),
        ({"plans": {}}, "plans: expected a list"),
        ({"schedules": [{}]}, r"damaged, schedules\[0\]: format"),
        ({"lowering": "none"}, "lowering: expected one of plain, fused, inductor, got 'none'"),
        ({"lowering": ["plain"]}, "lowering: expected one of"),
        ({"more": 1}, "the file: expected the fields"),
    ],
)
def test_bad_files_are_clear_errors(saved: Path, change: dict[str, Any], message: str) -> None:
    forge(saved, lambda document: document.update(change))
    with pytest.raises(PlanFileError, match=f"{re.escape(str(saved))}: {message}"):
        hrt.load(saved, stack())


@pytest.mark.parametrize(
    "content",
    [
        *(None, b"", b"\xff", b"{", b"[]", b'{"a": \x00}', b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": 1e999}'),
        *(b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a": ' * 150 + b"1" + b"}" * 150),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_no_plan_file_at_all(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(PlanFileError, match=r"x\.json"):
        hrt.load(tmp_path / "x.json", stack())


def test_overlapping_slots_are_found(saved: Path) -> None:
    def overlap(document: dict[str, Any]) -> None:
        document["plans"][0]["slot_offsets"] = [0] * len(document["plans"][0]["slot_offsets"])

    forge(saved, overlap)
    with pytest.raises(PlanFileError, match="slots 0 and 1 overlap"):
        hrt.load(saved, stack())


def test_nothing_to_save_yet(tmp_path: Path) -> None:
    model = stack()
    with pytest.raises(HarmonicaError, match="no plan to save yet"):
        hrt.compile(model, random_schedule(model, STEPS)).save(tmp_path / "plan.json")


def test_a_file_that_does_not_load_leaves_the_pipeline_plain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES["dit"]
    pipeline = family.build()
    pipeline.set_progress_bar_config(disable=True)
    hrt.compile(pipeline, random_schedule(pipeline.transformer, STEPS))
    sample(pipeline, STEPS, **family.guided)
    hrt.get_compiled(pipeline).save(tmp_path / "plan.json")
    hrt.uncompile(pipeline)
    forge(
        tmp_path / "plan.json",
        lambda document: document["plans"][0]["signature"]["leaves"][0].update(device="nowhere"),
    )
    with pytest.raises(PlanFileError, match="expected a device of the model"):
        hrt.load(tmp_path / "plan.json", pipeline)
    with pytest.raises(HarmonicaError, match="is not compiled"):
        hrt.get_compiled(pipeline)


def test_a_model_that_changed_since_its_last_run_is_not_saved(tmp_path: Path) -> None:
    model = stack()
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    outputs(compiled)
    model.blocks[0].mlp[1].approximate = "tanh"
    with pytest.raises(PlanFileError, match=r"blocks\.0\.mlp\.1\.approximate changed from none to tanh"):
        compiled.save(tmp_path / "plan.json")
    outputs(compiled)
    compiled.save(tmp_path / "plan.json")


def test_a_plan_that_was_saved_under_autocast(tmp_path: Path) -> None:
    model = stack()
    schedule = random_schedule(model, STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = hrt.compile(model, schedule, lowering="inductor", strict=True)
        expected = outputs(compiled)
    compiled.save(tmp_path / "plan.json")
    loaded = hrt.load(tmp_path / "plan.json", model, strict=True)  # not under autocast
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(loaded)
    assert [output.dtype for output in got] == [output.dtype for output in expected]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(loaded.report().plans) == 1


WRITTEN = """
from collections import namedtuple
import torch
from torch import nn

Output = namedtuple("Output", ["sample", "extra"])

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.attn(x)
        return x + FACTOR * self.mlp(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.table = torch.ones(4)
        self.wide = torch.ones(1).expand(4)

    def forward(self, input, scale=1.0):
        for block in self.blocks:
            input = block(input)
        return Output(input * self.table + self.wide, min(scale, 2.0) * input)
"""


def written(directory: Path, monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> Any:
    """A model whose code is in a file of its own."""
    directory.mkdir(exist_ok=True)
    (directory / "written_model.py").write_text(WRITTEN.replace("FACTOR", str(factor)))
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "written_model", raising=False)
    importlib.invalidate_caches()
    return importlib.import_module("written_model").Model().eval()


def run_written(compiled: Any, **arguments: Any) -> list[torch.Tensor]:
    compiled.reset()
    return [compiled(torch.full((1, 4), 0.1 * step), **arguments).sample for step in range(STEPS)]


def test_words_of_python_named_tuples_views_and_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(tmp_path, monkeypatch)
    schedule = random_schedule(model, STEPS)
    expected = run_written(hrt.reference(model, schedule), scale=float("inf"))
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    run_written(compiled, scale=float("inf"))
    compiled.save(tmp_path / "plan.json")
    monkeypatch.setattr(captures, "capture_model", None)
    loaded = hrt.load(tmp_path / "plan.json", model, strict=True)
    got = run_written(loaded, scale=float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    model.table.mul_(3.0)  # plain tensors are the model's own, as without a file
    assert not torch.equal(run_written(loaded, scale=float("inf"))[0], expected[0])


def test_edited_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = hrt.compile(model := written(tmp_path / "a", monkeypatch), random_schedule(model, STEPS), strict=True)
    run_written(compiled)
    compiled.save(tmp_path / "plan.json")
    hrt.load(tmp_path / "plan.json", written(tmp_path / "b", monkeypatch))
    with pytest.raises(PlanFileError, match="its class or its code"):
        hrt.load(tmp_path / "plan.json", written(tmp_path / "c", monkeypatch, factor=2.0))


def test_weights_that_are_no_longer_tied_are_refused(tmp_path: Path) -> None:
    def tied() -> Stack:
        model = stack()
        model.blocks[1].attn.weight = model.blocks[0].attn.weight
        return model

    model = tied()
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    outputs(compiled)
    compiled.save(tmp_path / "plan.json")
    hrt.load(tmp_path / "plan.json", tied())
    with pytest.raises(PlanFileError, match="sharing of its parameters"):
        hrt.load(tmp_path / "plan.json", stack())
    model.blocks[1].attn.weight = torch.nn.Parameter(model.blocks[1].attn.weight.detach() + 1)  # in the same process
    for got, expected in zip(outputs(compiled), outputs(hrt.reference(model, compiled.schedule)), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_class_that_is_not_imported_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = hrt.compile(model := written(tmp_path, monkeypatch), random_schedule(model, STEPS), strict=True)
    run_written(compiled)
    compiled.save(tmp_path / "plan.json")
    (tmp_path / "hostile_model.py").write_text("raise SystemExit('was run')\n")
    for name in ("hostile_model", "os"):

        def change(document: dict[str, Any], name: str = name) -> None:
            document["plans"][0]["graph"]["out_spec"]["class"] = [name, "Output"]

        forge(tmp_path / "plan.json", change)
        with pytest.raises(PlanFileError, match=f"{name}.Output' is not an imported container class"):
            hrt.load(tmp_path / "plan.json", model)


class Odd(Stack):
    """With an attribute that is a device, a device that is written out, and memory that is filled in halves."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.place = torch.device(device)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        halves = torch.empty_like(latents)
        halves[..., :4] = latents[..., 4:]
        halves[..., 4:] = latents[..., :4]
        return super().forward(halves + torch.ones(8, device=self.place), timestep)


def odd(device: str = "cpu") -> Odd:
    torch.manual_seed(0)
    return Odd(device).eval()


def test_a_plan_moves_to_the_device_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model holds its device as an attribute, under another name of it than it was saved with."""
    model = odd()
    compiled = hrt.compile(model, random_schedule(model, STEPS), lowering="plain", strict=True)
    expected = outputs(compiled)
    compiled.save(tmp_path / "plan.json")
    monkeypatch.setattr(captures, "capture_model", None)
    loaded = hrt.load(tmp_path / "plan.json", odd("cpu:0").to("cpu:0"), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), expected, strict=True))


def test_memory_that_nobody_wrote_is_saved_as_zeros(tmp_path: Path) -> None:
    model = odd()
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    outputs(compiled)
    assert any(node.target is torch.ops.aten.empty_like.default for node in captured(compiled).graph.nodes)
    compiled.save(tmp_path / "plan.json")
    assert "aten.zeros_like.default" in (tmp_path / "plan.json").read_text()
    assert "empty" not in (tmp_path / "plan.json").read_text()


def captured(compiled: Any) -> Any:
    """The graph of the only plan of a compiled model."""
    (runtime,) = compiled.plans.values()
    return runtime.lowered.plan.captured


class Windowed(Stack):
    """With a view that addresses memory by numbers."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        return super().forward(latents.as_strided(latents.shape, latents.stride()) * 2, timestep)


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path: Path) -> None:
    model = Windowed().eval()
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    outputs(compiled)
    with pytest.raises(PlanFileError, match=r"aten\.as_strided\.default is not among those that a saved plan may hold"):
        compiled.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def other_steps(saved: Path, *steps: int) -> tuple[Any, dict[int, list[torch.Tensor]]]:
    """A model that ran these numbers of steps under one schedule, and its outputs; its plans are in the file."""
    model = stack()
    compiled = hrt.compile(model, random_schedule(model, STEPS).with_taylor(), strict=True, on_other_steps="resample")
    found = {number: run_of(compiled, number) for number in steps}
    compiled.save(saved)
    return compiled, found


def run_of(compiled: Any, steps: int) -> list[torch.Tensor]:
    compiled.reset(steps=steps)
    return [compiled(**stack_call(step)) for step in range(steps)]


def test_plans_of_several_numbers_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    compiled, expected = other_steps(path, 9, STEPS, 6)
    document = json.loads(path.read_text())
    assert [plan["steps"] for plan in document["plans"]] == [9, STEPS, 6]
    assert [plan["graph"] for plan in document["plans"][1:]] == [{"of_plan": 0}] * 2
    monkeypatch.setattr(captures, "capture_model", None)  # nothing is captured
    loaded = hrt.load(path, stack())
    for steps, outputs_before in expected.items():
        for got, before in zip(run_of(loaded, steps), outputs_before, strict=True):
            torch.testing.assert_close(got, before)
    programs = {id(p) for runtime in loaded.plans.values() for p in runtime.lowered.lowering.programs}
    assert len(programs) == len({p for runtime in compiled.plans.values() for p in runtime.lowered.lowering.programs})
    assert len(run_of(loaded, 7)) == 7  # planned now, from the captured graph of the file
    loaded.save(tmp_path / "again.json")
    assert len(json.loads((tmp_path / "again.json").read_text())["plans"]) == 4


@pytest.fixture(scope="module")
def two_numbers(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with plans for 9 and 4 steps."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    other_steps(path, 9, STEPS)
    return path.read_bytes()


def test_what_becomes_of_other_steps_is_in_the_file(two_numbers: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(two_numbers)
    hrt.load(path, stack()).reset(steps=5)
    with pytest.raises(ScheduleMismatchError):
        hrt.load(path, stack(), on_other_steps="error").reset(steps=9)
    with pytest.raises(ArgumentError, match="on_other_steps"):
        hrt.load(path, stack(), on_other_steps="sometimes")


def test_a_set_of_schedules_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = stack(), tmp_path / "plan.json"
    given = ScheduleSet([random_schedule(model, 4), random_schedule(model, 7, seed=1).with_taylor()])
    compiled = hrt.compile(model, given, strict=True, lowering="plain")
    expected = {steps: run_of(compiled, steps) for steps in given.steps}
    compiled.save(path)
    monkeypatch.setattr(captures, "capture_model", None)
    loaded = hrt.load(path, stack())
    assert loaded.schedule == given
    for steps, outputs_before in expected.items():
        assert all(map(torch.equal, run_of(loaded, steps), outputs_before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plans: plans[1].update(steps=0), r"plans\[1\]\.steps: expected a whole number from 1 to 10000"),
        (lambda plans: plans[1].update(steps=10**6), r"plans\[1\]\.steps: expected a whole number"),
        (lambda plans: plans[1].update(steps=True), r"plans\[1\]\.steps: expected a whole number"),
        (lambda plans: plans[1].pop("steps"), r"plans\[1\]: expected the fields"),
        (lambda plans: plans[1].update(steps=9), r"plans\[1\]: "),
        (lambda plans: plans[1]["graph"].update(of_plan=1), r"plans\[1\]\.graph\.of_plan: expected the number of an"),
        (lambda plans: plans[1]["graph"].update(of_plan=-1), r"graph\.of_plan: expected the number of an"),
        (lambda plans: plans[1]["graph"].update(of_plan=False), r"graph\.of_plan: expected the number of an"),
        (lambda plans: plans[1]["graph"].update(more=1), r"plans\[1\]\.graph: expected the fields of_plan"),
        (lambda plans: plans[0].update(graph={"of_plan": 0}), r"plans\[0\]\.graph\.of_plan: expected the number of an"),
        (lambda plans: plans[1]["signature"]["leaves"][0].update(shape=[1, 4, 8]), r"plans\[1\]"),
    ],
)
def test_forged_numbers_of_steps_are_refused(two_numbers: bytes, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(two_numbers)
    forge(path, lambda document: change(document["plans"]))
    with pytest.raises(PlanFileError, match=message):
        hrt.load(path, stack())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_other_steps": "always"}, "on_other_steps: expected one of error, resample, plain"),
        ({"schedules": []}, "damaged, schedules: a set holds at least one"),
        ({"schedules": {}}, "damaged, schedules: expected a list"),
        ({"schedules": [1]}, r"damaged, schedules\[0\]: expected an object"),
    ],
)
def test_forged_schedules_are_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    forge(saved, lambda document: document.update(change))
    with pytest.raises(PlanFileError, match=message):
        hrt.load(saved, stack())
