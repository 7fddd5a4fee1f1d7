"""`harmonica-rt demo`: what it prints and draws, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from harmonica_rt.demo.run import DEFAULT_GUIDANCE, guidance_of
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.lower import plain
from tests.cli.running import STEPS, run
from tests.tiny import pixart_alpha, saved_and_loaded


def test_demo_compares_measures_and_draws(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    result = run("demo", "--model", model, "--steps", STEPS, "--batch", 3, "--repeats", 1, "--out", picture)
    assert result.exit_code == 0, result.output
    assert "parity ok (measured): 4 calls" in result.output
    assert "theoretical (FLOPs)" in result.output
    assert "50.0% of all entries reused" in result.output
    assert "  round 1 of 1" in result.output
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width == 1680
    assert 800 < height < 2000


def test_demo_tells_no_speedup_where_parity_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = plain.Program.__call__
    monkeypatch.setattr(plain.Program, "__call__", lambda *args: tuple(output * 1.01 for output in original(*args)))
    result = run("demo", "--model", model, "--steps", STEPS, "--repeats", 1, "--out", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert "parity FAILED" in result.output
    assert "speed-up withheld: images differ" in result.output
    assert not (tmp_path / "demo.png").exists()


def test_demo_is_for_dit(tmp_path: Path) -> None:
    saved_and_loaded(pixart_alpha, tmp_path)
    result = run("demo", "--model", tmp_path)
    assert isinstance(result.exception, HarmonicaError)
    assert f"the demo needs a DiTPipeline, but {tmp_path} holds a PixArtAlphaPipeline" in str(result.exception)


def test_demo_uses_the_recorded_guidance(tmp_path: Path) -> None:
    assert guidance_of(tmp_path) == DEFAULT_GUIDANCE
    record = tmp_path / "PROVENANCE.json"
    record.write_text('{"evaluation": {"guidance_scale": 1.5}}')
    assert guidance_of(tmp_path) == 1.5
    for malformed in ("{nope", "[]", '{"evaluation": 3}', '{"evaluation": {"guidance_scale": []}}'):
        record.write_text(malformed)
        with pytest.raises(HarmonicaError, match=r"PROVENANCE\.json: expected"):
            guidance_of(tmp_path)


def test_demo_steps_that_contradict_the_schedule(model: Path, schedule: Path, tmp_path: Path) -> None:
    result = run("demo", "--model", model, "--schedule", schedule, "--steps", 5, "--out", tmp_path / "demo.png")
    assert f"--steps is 5, but {schedule} is for 4 steps; leave --steps out" in str(result.exception)
