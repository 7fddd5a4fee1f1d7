"""Weights in the file: one line per step, shortest numbers, equal after reading, and every error of reading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import Schedule, WeightsBy, format
from harmonica_rt.schedule.weights_text import shortest

SITES = ["blocks.0.attn", "blocks.0.ff"]
MASK = [[1, 1], [0, 0], [1, 1], [0, 1], [0, 0]]
DOCUMENT = {
    "format": "harmonica-schedule",
    "version": 2,
    "steps": 5,
    "sites": SITES,
    "compute": ["11", "00", "11", "01", "00"],
    "weights": [[], [0.5], [], [1.5, -0.5], {"blocks.0.attn": [2, -1], "blocks.0.ff": [1]}],
    "weights_by": {"method": "fit", "hyper_parameters": {"images": 64}},
}
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any mask, and any weights that its histories allow."""
    steps, sites = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    mask = np.array([[True] * sites, *draw(st.lists(st.lists(st.booleans(), min_size=sites, max_size=sites),
                                                    min_size=steps - 1, max_size=steps - 1))])  # fmt: skip
    weights = np.zeros((steps, sites, 4))
    before = np.cumsum(mask, axis=0) - mask
    for step, site in np.argwhere(~mask):
        own = draw(st.lists(float32s, min_size=1, max_size=min(4, int(before[step, site]))).filter(any))
        weights[step, site, : len(own)] = own
    by = draw(st.none() | st.builds(WeightsBy, st.just("fit"), st.dictionaries(st.text(), st.integers(), max_size=2)))
    schedule = Schedule.from_array(mask, [f"blocks.{i}.ff" for i in range(sites)])
    return schedule.with_weights(weights, by=by if (~mask).any() else None)


@given(schedules())
def test_round_trip_is_equal_and_byte_stable(schedule: Schedule) -> None:
    text = format.to_text(schedule)
    again = Schedule(**format.parse(text.encode()))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert format.to_text(again) == text
    assert json.loads(text)["version"] == (1 if schedule.weights is None else 2)


@given(float32s)
def test_numbers_are_short_and_read_back(value: float) -> None:
    text = shortest(value)
    assert np.float32(json.loads(text)) == np.float32(value)
    assert len(text) <= len(repr(float(value)))


def test_numbers_as_a_person_writes_them() -> None:
    values = [0.1, 1.0, -0.5, 1 / 3, 1.5, 1e-8, 100.0, 2.0**-149]
    assert [shortest(float(np.float32(v))) for v in values] == [
        "0.1", "1", "-0.5", "0.33333334", "1.5", "1e-08", "100", "1e-45",
    ]  # fmt: skip


def test_a_step_is_a_line_and_a_site_has_one_where_sites_differ() -> None:
    schedule = Schedule(**format.parse(json.dumps(DOCUMENT).encode()))
    text = format.to_text(schedule)
    start = text.index('  "weights"')
    assert text[start : text.index("  ],", start)].splitlines() == [
        '  "weights": [',
        "    [],",
        "    [0.5],",
        "    [],",
        "    [1.5, -0.5],",
        "    {",
        '      "blocks.0.attn": [2, -1],',
        '      "blocks.0.ff": [1]',
        "    }",
    ]
    assert json.loads(text) == DOCUMENT
    weights = schedule.entry_weights.copy()
    weights[3, 0, 1] = -0.25
    changed = format.to_text(schedule.with_weights(weights, by=schedule.weights_by))
    lines = [(a, b) for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b]
    assert lines == [("    [1.5, -0.5],", "    [1.5, -0.25],")]


def test_without_weights_a_file_is_of_version_1() -> None:
    schedule = Schedule.from_array(MASK, SITES)
    text = format.to_text(schedule)
    assert text == format.to_text(schedule.with_weights(np.ones((5, 1))))
    assert '"version": 1,' in text
    assert "weights" not in text
    second = json.dumps({**json.loads(text), "version": 2}).encode()
    assert format.to_text(Schedule(**format.parse(second))) == text


BAD = {
    "version": ({"version": 1}, "weights: version 1 has no such field; a file with weights is of version 2"),
    "by-version": ({"version": 1, "weights": ...}, "weights_by: version 1 has no such field"),
    "by-alone": ({"weights": ...}, "weights_by: says who made the weights, but there are none"),
    "by-unknown": ({"weights_by": {"method": "m", "hyper": {}}}, "weights_by.hyper: unknown field"),
    "by-text": ({"weights_by": "fit"}, "weights_by: expected an object, got a string"),
    "null": ({"weights": None}, "weights: null; leave the field out"),
    "text": ({"weights": "1"}, "weights: expected a list, got str"),
    "few": ({"weights": [[]]}, "weights: expected one item per step (5), got 1"),
    "computed": ({3: [1], 2: [1]}, "weights, step 2: expected [], since the step computes all sites, got [1]"),
    "empty": ({1: []}, "weights, step 1: expected 1 to 4 weights, newest value first, got 0; [1] is plain reuse"),
    "many": ({1: [1, 1, 1, 1, 1]}, "weights, step 1: expected 1 to 4 weights, newest value first, got 5"),
    "number": ({1: 1}, "weights, step 1: expected a list of weights, got a number"),
    "bool": ({1: [True]}, "weights, step 1: expected a number, got True"),
    "string": ({4: {"blocks.0.attn": ["2"], "blocks.0.ff": [1]}}, "weights, step 4, blocks.0.attn: expected a number"),
    "large": ({1: [1e39]}, "weights, step 1: expected finite numbers that float32 can hold, got 1e+39"),
    "digits": ({1: [10**399]}, "weights, step 1: expected a finite number, got inf"),
    "zero": ({1: [0]}, "weights, step 1: those of 'blocks.0.attn', [0.0, 0.0, 0.0, 0.0], are all 0 in float32"),
    "early": ({1: [1, 1]}, "weights, step 1: those of 'blocks.0.attn', [1.0, 1.0, 0.0, 0.0], use more values"),
    "site": ({4: {"blocks.0.atn": [1]}}, "weights, step 4: 'blocks.0.atn' is not a site of this schedule"),
    "site-computed": (
        {3: {"blocks.0.attn": [1], "blocks.0.ff": [1]}},
        "weights, step 3: 'blocks.0.ff' is computed at this step and has no weights",
    ),
    "site-missing": ({4: {"blocks.0.attn": [1]}}, "weights, step 4: no weights for 'blocks.0.ff', which is reused"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_weights(tmp_path: Path, change: dict[str | int, object], message: str) -> None:
    rows = list(DOCUMENT["weights"])  # type: ignore[call-overload]
    document = {**DOCUMENT, "weights": rows}
    for key, value in change.items():
        if isinstance(key, int):
            rows[key] = value
        else:
            document[key] = value
    path = tmp_path / "s.json"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        Schedule.load(path)
    assert str(caught.value).startswith(f"{path}: {message[:7]}")


def test_a_site_that_occurs_twice_in_a_step(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(DOCUMENT).replace('"blocks.0.ff": [1]', '"blocks.0.attn": [1]'))
    with pytest.raises(ScheduleError, match="the field occurs more than once"):
        Schedule.load(path)
