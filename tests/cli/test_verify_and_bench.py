"""`harmonica-rt verify` and `harmonica-rt bench`: what passes, what fails, and which options they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmonica_rt.lower import plain
from harmonica_rt.options import CompileOptions
from tests.cli.running import run


def test_verify(model: Path, schedule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = run("verify", model, schedule, "--lowering", "plain", "--arg", "class_labels=[3]")
    assert exact.exit_code == 0
    assert "4 equal bit for bit" in exact.output
    good = run("verify", model, schedule, "--arg", "class_labels=[3]")
    assert good.exit_code == 0
    assert "parity ok (measured)" in good.output
    original = plain.Program.__call__
    monkeypatch.setattr(plain.Program, "__call__", lambda *args: tuple(output * 1.01 for output in original(*args)))
    bad = run("verify", model, schedule)
    assert bad.exit_code == 1
    assert "parity FAILED" in bad.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arg", "prompt=cat"], "takes no argument 'prompt'"),
        (["--arg", "class_labels"], "expected name=value"),
        (["--tolerance", "loose"], "--tolerance loose is not known"),
        (["--arg", "self=1"], "takes no argument 'self'"),
        (["--arg", "generator=1"], "generators are made from --seed"),
        (["--arg", "class_labels=[77777]"], "failed when called with num_inference_steps=4, class_labels=[77777]: Ind"),
        (["--arg", "class_labels=[]"], "failed when called with num_inference_steps=4, class_labels=[]: RuntimeError"),
        (["--arg", "guidance_scale=2", "--guidance", "3"], "set the same argument; give one of them"),
        (["--arg", "num_inference_steps=7"], "or pass --arg num_inference_steps=VALUE so that"),
        (
            ["--arg", "class_labels=7"],
            "failed when called with num_inference_steps=4, class_labels=7: TypeError: object of type 'int'",
        ),
        (["--dtype", "int8"], "dtype int8 is not known"),
        (["--device", "banana"], "device 'banana' is not known"),
        (["--device", "cpu:x"], "device 'cpu:x' is not known"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--device", "cuda:99"], "there is no device cuda:99"),
    ],
    ids=[
        "argument",
        "pair",
        "tolerance",
        "self",
        "generator",
        "unknown-class",
        "no-class",
        "guidance-twice",
        "steps",
        "value",
        "dtype",
        "device",
        "index",
        "kind-of-device",
        "absent-device",
    ],
)
def test_verify_refuses_bad_options(model: Path, schedule: Path, options: list[str], message: str) -> None:
    assert message in str(run("verify", model, schedule, *options).exception)


def test_bench(model: Path, schedule: Path) -> None:
    result = run("bench", model, schedule, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "theoretical speed-up" in result.output
    assert "parity ok" in result.output


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_graphs_reach_the_compiler(command: str, model: Path, schedule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(CompileOptions, "__post_init__", lambda options: given.append(options.graphs))
    assert run(command, model, schedule, "--graphs", "off", *["--repeats", 1] * (command == "bench")).exit_code == 0
    assert "off" in given


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_unknown_graphs_are_refused(command: str, model: Path, schedule: Path) -> None:
    message = str(run(command, model, schedule, "--graphs", "maybe").exception)
    assert message == "graphs 'maybe' is not known; choose one of auto, on, off"


def test_other_numbers_of_steps(model: Path, schedule: Path) -> None:
    call = ("verify", model, schedule, "--lowering", "plain", "--arg", "num_inference_steps=6")
    assert "the schedule is for 4 steps, but the pipeline asked for 6" in str(run(*call).exception)
    assert "6 calls" in run(*call, "--on-other-steps", "resample").output
