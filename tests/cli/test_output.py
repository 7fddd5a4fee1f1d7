"""What commands print, and where it goes: whole names, closed pipes, quiet libraries."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harmonica_rt import cli
from harmonica_rt.demo import bundled_model
from tests.cli.running import run


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_names_are_never_cut(columns: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt import recipes

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(cli.console.console, "_width", None)
    lines = run("recipes").output.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == list(recipes.known())
    assert "    model: facebook/DiT-XL-2-256" in lines
    assert "transformer_blocks.0.attn1" in run("sites", model).output.splitlines()
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)
    assert (
        f"written to {deep / 'x.json'}"
        in run("schedule", "make", model, deep / "x.json", "--every", 2).output.splitlines()
    )


@pytest.mark.parametrize("command", ["recipes", pytest.param("sites", marks=pytest.mark.exhaustive), "schedule"])
def test_a_closed_pipe_and_a_full_disk_behind_the_output(command: str, tmp_path: Path) -> None:
    arguments = {"recipes": [], "sites": [str(bundled_model())], "schedule": ["show", str(bundled_model())]}[command]
    shell = f"{shlex.join([sys.executable, '-m', 'harmonica_rt.cli', command, *arguments])}"
    piped = subprocess.run(["bash", "-c", f"{shell} | true"], capture_output=True, text=True)
    assert piped.stderr == ""
    full = subprocess.run(["bash", "-c", f"{shell} > /dev/full"], capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr == "error: No space left on device\n"


def test_loading_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    voices = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    for voice in voices:
        voice.enable_propagation()  # to caplog; the handlers hold the stderr of their first import
    try:
        before = [(voice.get_verbosity(), voice.is_progress_bar_enabled()) for voice in voices]
        assert run("sites", bundled_model()).exit_code == 0
        assert (capsys.readouterr().err, caplog.messages) == ("", [])
        assert [(voice.get_verbosity(), voice.is_progress_bar_enabled()) for voice in voices] == before
        assert run("--debug", "sites", bundled_model()).exit_code == 0
        assert any("id2label" in message for message in caplog.messages)
    finally:
        cli.console.set_debug(False)
        for voice in voices:
            voice.disable_propagation()


def test_help_and_version_load_no_torch() -> None:
    code = "import sys; from harmonica_rt import cli; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert run("--version").output == "harmonica-rt 0.1.0\n"
