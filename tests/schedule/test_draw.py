"""The pictures: what the terminal drawing says, and that the heat map is written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo, Schedule, render
from harmonica_rt.untrusted.text import one_line


def blocks(n: int, *kinds: str) -> list[str]:
    return [f"blocks.{i}.{kind}" for i in range(n) for kind in kinds]


def test_drawing_without_colour() -> None:
    mask = np.ones((3, 4), dtype=bool)
    mask[1, [0, 2, 3]] = False
    schedule = Schedule.from_array(
        mask,
        blocks(2, "attn1", "ff"),
        model=ModelInfo("DiT", "sha256:12"),
        sampler=SamplerInfo("DDIMScheduler"),
        timesteps=[999, 500, 1],
        guidance=1.5,
        made_by=MadeBy("harmonica", {"beta": 7e-8}, threshold=0.1, scores=[[1.0] * 4] * 3),
    )
    lines = [line.rstrip() for line in render(schedule, width=80).plain.splitlines()]
    assert lines == [
        "3 steps x 4 sites, CUR 25.00%, 2 patterns",
        "CUR by kind attn1 33.33%, ff 16.67%",
        "model       DiT (sha256:12)",
        "sampler     DDIMScheduler",
        "timesteps   999 ... 1",
        "guidance    1.5",
        "made by     harmonica, beta=7e-08, threshold 0.1, with scores",
        "",
        "step  attn1   ff    CUR",
        "   0  ██      ██   0.0%",
        "   1  ··      █·  75.0%",
        "   2  ██      ██   0.0%",
        "",
        "█ compute  · reuse",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize(("steps", "sites"), [(20, blocks(10, "attn1", "ff")), (50, blocks(57, "attn", "ff", "ctx"))])
def test_rows_fit_into_the_width(steps: int, sites: list[str], width: int) -> None:
    drawing = render(Schedule.random(0.5, steps=steps, sites=sites, seed=0), width=width).plain
    rows = drawing.split("\n\n")[1].splitlines()
    assert len(rows) == steps + 1
    assert max(map(len, rows)) <= width
    fits = len(sites) + 10 + 3 * len({site.split(".")[-1] for site in sites}) <= width
    assert ("sites per column" in drawing) == (not fits)


def test_shades_tell_the_share_of_a_column() -> None:
    mask = np.array([[1] * 40, [1, 1, 1, 0, 0, 0, 1, 0] * 5], dtype=bool)
    drawing = render(Schedule.from_array(mask, blocks(40, "ff")), width=24).plain
    assert "some of 4 sites per column" in drawing
    assert "▓░" * 5 in drawing


def test_sites_of_many_kinds_stand_in_one_panel() -> None:
    drawing = render(Schedule.every(2, steps=2, sites=["down", "mid", "up"]), width=80).plain
    assert "step  sites" in drawing
    assert "   1  ···   100.0%" in drawing


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    schedule = Schedule.all_compute(steps=1, sites=["a"]).with_provenance(model=ModelInfo("\x1b[31mred\n"))
    assert "model       \\x1b[31mred\\n\n" in render(schedule, width=80).plain


def odd_schedule(name: str) -> Schedule:
    """Every text of the schedule is `name`."""
    return Schedule.every(2, steps=2, sites=[f"0.{name}", f"1.{name}"]).with_provenance(
        model=ModelInfo(name, name), sampler=SamplerInfo(name, {name: name}), made_by=MadeBy(name, {name: name})
    )


@pytest.mark.parametrize("name", ["\x1b[2J", "\u202egnp", "\x9b31m", "x\x00y", "y" * 50_000], ids=ascii)
def test_nothing_that_a_schedule_says_steers_a_terminal(name: str) -> None:
    schedule = odd_schedule(name)
    assert render(schedule, width=80).plain.replace("\n", "").isprintable()
    assert repr(schedule).isprintable()
    assert len(repr(schedule)) < 250


@pytest.mark.parametrize(
    "name", ["$\\frac{1}{0}$", "$", "[/b]", "\x1b[2J", "_{^", "y" * 50_000], ids=lambda name: ascii(name)[:20]
)
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    figure = odd_schedule(name).plot(tmp_path / "s.png")
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert titles[0] == (name if name.isprintable() and len(name) < 60 else one_line(name, 60))
    assert (tmp_path / "s.png").exists()


def test_a_schedule_of_a_thousand_sites_and_steps_is_drawn() -> None:
    figure = Schedule.every(2, steps=1000, sites=blocks(1500, "ff")).plot()
    assert tuple(figure.get_size_inches()) == (40.0, 100.0)


def test_drawing_prints_through_a_pipe() -> None:
    out = io.StringIO()
    Console(file=out, width=30).print(render(Schedule.every(2, steps=2, sites=blocks(2, "ff")), width=30))
    assert "\x1b" not in out.getvalue()
    assert "   1  ·· 100.0%" in out.getvalue()


@pytest.mark.parametrize(
    ("steps", "sites", "inches"),
    [
        (20, blocks(10, "attn1", "ff"), (8.7, 7.9)),
        (20, blocks(28, "attn1", "ff"), (12.2, 7.9)),
        (50, blocks(57, "attn", "ff", "ff_context"), (13.6, 8.4)),
        (1, ["head"], (5.1, 2.2)),
        (4, ["in.0.attn", "mid.attn", "out.0.attn", "in.0.mlp", "mid.mlp", "out.0.mlp"], (5.3, 3.1)),
    ],
    ids=["20x20", "20x56", "50x171", "1x1", "unequal-paths"],
)
def test_plot_writes_an_image(tmp_path: Path, steps: int, sites: list[str], inches: tuple[float, float]) -> None:
    schedule = Schedule.every(2, steps=steps, sites=sites)
    figure = schedule.plot(tmp_path / "s.png")
    assert figure.get_size_inches() == pytest.approx(inches, rel=0.1)
    height, width, _ = imread(tmp_path / "s.png").shape
    assert (width, height) == pytest.approx(tuple(160 * figure.get_size_inches()), abs=2)
    assert f"CUR {schedule.cur:.2%}" in figure.get_suptitle()
    kinds = list(schedule.cur_per_kind())
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] in ([*kinds, "CUR"], ["sites", "CUR"])


def test_plot_writes_svg_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    Schedule.every(3, steps=6, sites=blocks(3, "attn", "ff")).plot(tmp_path / "s.svg")
    assert "<svg" in (tmp_path / "s.svg").read_text()
    assert plt.get_fignums() == before
