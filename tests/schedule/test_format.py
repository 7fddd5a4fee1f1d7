"""The file: round trip, byte stability, one line per step, atomic writing, and every error of reading."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo, Schedule, ScheduleSet, format

SITES = ["blocks.0.attn1", "blocks.0.ff", "blocks.1.attn1", "blocks.1.ff"]
DOCUMENT = {
    "format": "harmonica-schedule",
    "version": 1,
    "steps": 3,
    "sites": SITES,
    "compute": ["1111", "0001", "1011"],
    "model": {"class_name": "DiT"},
    "sampler": {"class_name": "DDIM", "config": {"steps": 3}},
    "timesteps": [2.0, 1.0, 0.0],
    "guidance": 1.5,
    "made_by": {
        "method": "m",
        "hyper_parameters": {},
        "threshold": 0.1,
        "scores": [None, [1, 2, 3, 4], None],
    },
}

numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.text(min_size=1).filter(str.strip)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps, n = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=steps - 1, max_size=steps - 1))
    configs = st.dictionaries(st.text(), values, max_size=3)
    row = st.none() | st.lists(numbers, min_size=n, max_size=n)
    scores = st.none() | st.lists(row, min_size=steps, max_size=steps)
    return Schedule.from_array(
        np.array([[True] * n, *rows]),
        [f"blocks.{i}.{draw(st.sampled_from(['attn', 'ff']))}" for i in range(n)],
        model=draw(st.none() | st.builds(ModelInfo, names, st.none() | names)),
        sampler=draw(st.none() | st.builds(SamplerInfo, names, configs)),
        timesteps=draw(st.none() | st.lists(numbers, min_size=steps, max_size=steps)),
        guidance=draw(st.none() | numbers),
        made_by=draw(st.none() | st.builds(MadeBy, names, configs, st.none() | numbers, scores)),
    )


@given(schedules())
def test_round_trip_is_equal_and_byte_stable(schedule: Schedule) -> None:
    text = format.to_text(schedule)
    again = Schedule(**format.parse(text.encode()))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert format.to_text(again) == text


def load(tmp_path: Path, document: object) -> Schedule:
    path = tmp_path / "s.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return Schedule.load(path)


def test_load_reads_every_field(tmp_path: Path) -> None:
    schedule = load(tmp_path, DOCUMENT)
    assert schedule == Schedule.from_array(
        [[1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1]],
        SITES,
        model=ModelInfo("DiT"),
        sampler=SamplerInfo("DDIM", {"steps": 3}),
        timesteps=[2, 1, 0],
        guidance=1.5,
        made_by=MadeBy("m", threshold=0.1, scores=[None, [1, 2, 3, 4], None]),
    )


def test_a_changed_step_is_one_changed_line(tmp_path: Path) -> None:
    schedule = load(tmp_path, DOCUMENT)
    mask = schedule.compute.copy()
    mask[1, 2] = True
    changed = Schedule.from_array(
        mask, SITES, model=schedule.model, sampler=schedule.sampler, timesteps=schedule.timesteps,
        guidance=schedule.guidance, made_by=schedule.made_by,
    )  # fmt: skip
    before, after = format.to_text(schedule).splitlines(), format.to_text(changed).splitlines()
    lines = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert lines == [('    "0001",', '    "0011",')]


def test_bytes_do_not_depend_on_the_order_of_a_config() -> None:
    one, two = (
        Schedule.all_compute(steps=1, sites=["a"]).with_provenance(sampler=SamplerInfo("D", config))
        for config in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert one == two
    assert format.to_text(one) == format.to_text(two)


def test_save_writes_valid_json_with_a_newline_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")
    schedule = Schedule.every(2, steps=4, sites=SITES)
    schedule.save(path)
    assert path.read_bytes().endswith(b"}\n")
    assert json.loads(path.read_text())["compute"] == ["1111", "0000", "1111", "0000"]
    assert os.listdir(tmp_path) == ["s.json"]
    assert Schedule.load(str(path)) == schedule


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Schedule.every(2, steps=4, sites=SITES).save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["s.json"]


def test_documented_examples_are_what_save_writes(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "schedule-format.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    *examples, of_set = examples
    assert len(examples) == 2
    (tmp_path / "set.json").write_text(of_set)
    ScheduleSet.load(tmp_path / "set.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == of_set
    for example in examples:
        schedule = Schedule(**format.parse(example.encode()))
        assert format.to_text(schedule) == example
        assert schedule.weights is None or schedule == schedule.with_taylor()


@pytest.mark.parametrize("name", Schedule.known_names())
def test_bundled_files_are_what_save_writes(name: str) -> None:
    data = (resources.files("harmonica_rt.schedule") / "known" / f"{name}.json").read_bytes()
    assert format.to_text(Schedule.known(name)).encode() == data


def test_missing_file_is_both_kinds_of_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such schedule file"):
        Schedule.load(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="no such schedule file"):
        Schedule.load(tmp_path / "none.json")


BAD_TEXT = {
    "empty": ("", "not a schedule file: not JSON, Expecting value at line 1, column 1"),
    "yaml": ("format: x", "not a schedule file: not JSON"),
    "trailing-comma": ('{"format": 1,}', "not a schedule file: not JSON"),
    "list": ("[]", "not a schedule file: expected a JSON object, got a list"),
    "nan": ('{"guidance": NaN}', "NaN is not JSON; numbers must be finite"),
    "infinity": ('{"guidance": -Infinity}', "-Infinity is not JSON; numbers must be finite"),
    "duplicate": ('{"steps": 1, "steps": 1}', "steps: the field occurs more than once; keep one"),
    "duplicate-inside": ('{"model": {"a": 1, "a": 2}}', "a: the field occurs more than once"),
    "deep": ("[" * 100_000, "not a schedule file: JSON nested too deep"),
    "long-number": ('{"guidance": ' + "1" * 10_000 + "}", "not a schedule file: a number of 10000 digits"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_not_a_schedule_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "s.json"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ScheduleError, match="not a schedule file: not UTF-8 text"):
        Schedule.load(tmp_path / "s.json")


BAD_FIELDS = {
    "no-format": ({"format": ...}, "format: expected 'harmonica-schedule', got None; this is not a schedule file"),
    "other-format": ({"format": "x"}, "format: expected 'harmonica-schedule', got 'x'"),
    "newer": ({"version": 3}, "version: this harmonica-rt reads versions 1 and 2, got 3; a newer file needs a newer"),
    "version-text": ({"version": "1"}, "version: this harmonica-rt reads versions 1 and 2, got '1'"),
    "version-bool": ({"version": True}, "version: this harmonica-rt reads versions 1 and 2, got True"),
    "version-float": ({"version": 1.0}, "version: this harmonica-rt reads versions 1 and 2, got 1.0"),
    "missing": ({"compute": ...}, "compute: missing field; required are format, version, steps, sites, compute"),
    "unknown": ({"guidence": 2}, "guidence: unknown field; did you mean 'guidance'?"),
    "unknown-far": ({"zzz": 2}, "zzz: unknown field; the fields are format, version"),
    "unknown-inside": ({"model": {"class": "D"}}, "model.class: unknown field; did you mean 'class_name'?"),
    "missing-inside": ({"sampler": {"class_name": "D"}}, "sampler.config: missing field"),
    "null": ({"guidance": None}, "guidance: null; leave the field out"),
    "null-inside": ({"made_by": {"method": "m", "hyper_parameters": None}}, "made_by.hyper_parameters: null"),
    "steps-text": ({"steps": "3"}, "steps: expected a whole number of at least 1, got '3'"),
    "steps-bool": ({"steps": True}, "steps: expected a whole number of at least 1, got True"),
    "steps-zero": ({"steps": 0, "compute": []}, "steps: expected a whole number of at least 1, got 0"),
    "steps-other": ({"steps": 4}, "compute: expected one string per step (4 by the field 'steps'), got 3"),
    "compute-text": ({"compute": "1111"}, "compute: expected a list, got str"),
    "compute-lists": ({"compute": [[1], "1", "1"]}, "compute, step 0: expected a string of 0 and 1, got a list"),
    "row-short": ({"compute": ["1111", "111", "1111"]}, "compute, step 1: expected one entry per site (4), got 3"),
    "row-letter": (
        {"compute": ["1111", "1111", "11x1"]},
        "compute, step 2: expected only 0 (reuse) and 1 (compute), got 'x' at position 2",
    ),
    "row-digit": ({"compute": ["1111", "\u0661111", "1111"]}, "compute, step 1: expected only 0 (reuse)"),
    "first-reuses": (
        {"compute": ["1101", "1111", "1111"]},
        "compute: step 0 reuses 1 of 4 sites ('blocks.1.attn1' first)",
    ),
    "sites-text": ({"sites": "abcd"}, "sites: expected a list, got str"),
    "sites-empty": ({"sites": [], "compute": ["", "", ""]}, "sites: expected at least one site, got none"),
    "sites-number": ({"sites": [1, 2, 3, 4]}, "sites[0]: expected a dotted module path"),
    "sites-twice": ({"sites": ["a", "b", "c", "a"]}, "sites: each site may appear only once, got several times: a"),
    "model-text": ({"model": "DiT"}, "model: expected an object, got a string"),
    "model-number": ({"model": {"class_name": 3}}, "model.class_name: expected a non-empty string, got 3"),
    "config-list": ({"sampler": {"class_name": "D", "config": []}}, "sampler.config: expected a mapping"),
    "timesteps-short": ({"timesteps": [1, 2]}, "timesteps: expected one per step (3), got 2"),
    "timesteps-text": ({"timesteps": [1, 2, "3"]}, "timesteps[2]: expected a number, got '3'"),
    "guidance-text": ({"guidance": "high"}, "guidance: expected a number, got 'high'"),
    "made-by-list": ({"made_by": ["m"]}, "made_by: expected an object, got a list"),
    "scores-short": (
        {"made_by": {"method": "m", "hyper_parameters": {}, "scores": [None, [1], None]}},
        "made_by.scores, step 1: expected one per site (4), got 1",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    document = {key: value for key, value in {**DOCUMENT, **change}.items() if value is not ...}
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        load(tmp_path, document)
    assert str(caught.value).startswith(f"{tmp_path / 's.json'}: {message[:10]}")


def test_number_beyond_floats(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="guidance: expected a finite number, got inf"):
        load(tmp_path, json.dumps(DOCUMENT).replace("1.5", "1e999"))
