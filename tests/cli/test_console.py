"""What files, paths and names say is printed as it is: never markup, and never an order to the terminal."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from harmonica_rt import Schedule, cli
from harmonica_rt.cli import console as console_module
from harmonica_rt.cli.console import console, fail, line
from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo
from tests.cli.running import run

NAMES = ["[/b]", "[bold red]x", "[/]", "\\[b]", "\x1b[2J\x1b]0;owned\x07", "\x9b2J", "a\x00b", "\u202egnp", ":smile:"]


def steers(text: str) -> bool:
    return not text.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    console.print(name)
    console.print(line((name, "bold"), name))
    console.print(table)
    fail(ScheduleError(name))
    captured = capsys.readouterr()
    shown = name if not steers(name) else name.encode("unicode_escape").decode()
    assert captured.out.startswith(f"{shown}\n{shown}{shown}\n")
    assert captured.out.count(shown) == 6
    assert captured.err == f"error: {shown}\n"
    assert not steers(captured.out + captured.err)


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name and "\x00" not in name], ids=ascii)
def test_paths_are_printed_as_they_are(name: str, tmp_path: Path) -> None:
    source, picture = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
    Schedule.every(2, steps=2, sites=["a"]).save(source)
    result = run("schedule", "plot", source, picture)
    assert result.exit_code == 0, result.output
    assert picture.exists()
    assert not steers(result.output)
    folder = tmp_path / "[" / "b]"
    folder.mkdir(parents=True)
    assert run("schedule", "plot", source, folder / "s.png").exit_code == 0


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_show_prints_what_a_schedule_says(name: str, tmp_path: Path) -> None:
    schedule = Schedule.every(2, steps=2, sites=[name.replace(" ", "")]).with_provenance(
        model=ModelInfo(name, name), sampler=SamplerInfo(name, {name: name}), made_by=MadeBy(name, {name: name})
    )
    schedule.save(tmp_path / "s.json")
    result = run("schedule", "show", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert not steers(result.output)
    assert line(name).plain in result.output


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_errors_that_cite_a_file_end_as_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text(json.dumps({name: 1, "format": name}))
    monkeypatch.setattr("sys.argv", ["harmonica-rt", "schedule", "show", str(tmp_path / "s.json")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert not steers(captured.err)


def test_commands_print_no_markup() -> None:
    """The consoles know none, so that a `[bold]` in a command would be printed as it is."""
    folder = Path(console_module.__file__).parent
    found = [
        f"{path.name}:{node.lineno}"
        for path in folder.glob("*.py")
        if path.name != "console.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.search(r"\[(/|bold|dim|red|green|yellow)", str(node.value))
    ]
    assert not found, f"use line((text, style), ...) of cli/console.py in {', '.join(found)}"


def test_typer_prints_no_markup_of_ours() -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    def command() -> None:
        raise typer.BadParameter("there is no directory [/b]")

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "there is no directory [/b]" in result.output
