"""Weights in the pictures and on the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harmonica_rt.schedule import Schedule, WeightsBy, render
from harmonica_rt.schedule.hub import card

SITES = [f"blocks.{block}.{kind}" for block in range(2) for kind in ("attn1", "ff")]


def test_drawing_without_colour() -> None:
    schedule = Schedule.from_mask({"attn1": "11010", "blocks.0.ff": "11000", "*": "11010"}, sites=SITES).with_taylor()
    lines = [line.rstrip() for line in render(schedule, width=80).plain.splitlines()]
    assert lines[2:] == [
        "made by     step-mask",
        "weights     up to 2 per entry, 9 of 9 reused entries, made by taylor, order=1, since=0",
        "",
        "step  attn1   ff    CUR  weights",
        "   0  ██      ██   0.0%",
        "   1  ██      ██   0.0%",
        "   2  22      22 100.0%  2 -1",
        "   3  ██      2█  25.0%  3 -2",
        "   4  22      22 100.0%  by site",
        "",
        "█ compute  · reuse  1-4 reuse with so many weights",
    ]


def test_one_weight_other_than_1_is_drawn() -> None:
    schedule = Schedule.every(2, steps=4, sites=["a"]).with_weights([[1], [1], [1], [0.5]])
    rows = render(schedule, width=80).plain.split("\n\n")[1].splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["0", "█", "0.0%"], ["1", "·", "100.0%", "1"], ["2", "█", "0.0%"], ["3", "1", "100.0%", "0.5"],
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 30, 40, 60, 200])
def test_rows_fit_into_the_width(width: int) -> None:
    sites = [f"blocks.{block}.ff" for block in range(30)]
    drawing = render(Schedule.every(3, steps=9, sites=sites).with_taylor(3), width=width).plain
    rows = drawing.split("\n\n")[1].splitlines()
    assert max(map(len, rows)) <= width
    assert ("  weights" in rows[0]) == (width > 70)
    assert "3" in rows[8]


def test_long_settings_are_counted() -> None:
    schedule = Schedule.every(2, steps=6, sites=["a"]).with_ratios([1, 1, 1, 0.5, 1, 1])
    assert "made by ratios, ratios=6 values\n" in render(schedule, width=80).plain


def test_heat_map_has_a_colour_per_number_of_weights_and_the_weights(tmp_path: Path) -> None:
    schedule = Schedule.every(3, steps=12, sites=SITES).with_taylor(2)
    figure = schedule.plot(tmp_path / "s.png")
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["attn1", "ff", "CUR", "weights"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["compute", "reuse", "reuse, 2 weights", "reuse, 3 weights"]
    marks = [line.get_data() for line in figure.axes[-1].lines if len(line.get_xdata()) == 1]
    drawn = {(round(float(x[0]), 4), float(y[0])) for x, y in marks}
    weights = schedule.weights
    assert weights is not None
    expected = {
        (round(float(weights[step, place]), 4), step + 0.5)
        for step in np.flatnonzero(~schedule.compute[:, 0]) for place in range(3) if weights[step, place]
    }  # fmt: skip
    assert drawn == expected


def test_plain_schedules_are_drawn_as_before() -> None:
    figure = Schedule.every(3, steps=12, sites=SITES).plot()
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["attn1", "ff", "CUR"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["compute", "reuse"]


def test_the_card_mentions_them() -> None:
    schedule = Schedule.every(2, steps=6, sites=SITES).with_taylor()
    assert "| weights | up to 2 per entry, 8 of 12 reused entries, made by taylor, order=1, since=0 |" in card(
        schedule, None
    )
    assert "weighted sum" in card(schedule, None)
    assert "weight" not in card(schedule.with_weights(None), None)


def test_a_maker_of_weights_steers_neither_terminal_nor_card() -> None:
    by = WeightsBy("\x1b[2J|<b>", {"\x1b[2J|<b>": "\x1b[2J"})
    schedule = Schedule.every(2, steps=4, sites=["a"]).with_weights([[1], [1], [1], [2]], by=by)
    assert render(schedule, width=80).plain.replace("\n", "").isprintable()
    assert "\x1b" not in card(schedule, None)
    assert "|<" not in card(schedule, None)
