"""Run a command of the command line in this process."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner, Result

from harmonica_rt import cli

STEPS = "4"  # of the schedule that the fixture `schedule` makes


def run(*arguments: object) -> Result:
    """Run a command; errors of the project come back as `result.exception`."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the whole command line writes to stderr as it ends with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["harmonica-rt", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err
