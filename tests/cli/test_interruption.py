"""Ctrl-C, SIGTERM and SIGHUP: what a command does about them, and what a training keeps."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harmonica_rt import Schedule
from harmonica_rt.cli import loading, signals
from harmonica_training import TrainingInterrupted, training_state
from harmonica_training.checkpoint import latest_checkpoint
from harmonica_training.console_progress import ConsoleProgress
from tests.cli.running import run
from tests.forked import forked, module, two_by_torchrun
from tests.training.small import config, dit

MANY = ["--steps", "5", "--iterations", "8", "--batch", "2", "--renew-every", "2", "--learning-rate", "0.3"]
MANY += ["--guidance", "1", "--target-cur", "0.4"]
PROGRAM = [sys.executable, "-m", "harmonica_rt.cli"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "60"}
PATIENCE = 300  # seconds that no test should need


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the processes have, so that sums are added up in the same order here and there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whose_checkpoints_take_forever(*words: str) -> None:
    """A training that never ends writing a checkpoint."""

    def never(*_: object) -> None:
        print("writing", file=sys.stderr)
        time.sleep(600)

    training_state.save_checkpoint = never
    module("harmonica_rt.cli", *words)


class Training:
    """A training in a process of its own that has come to its second iteration; `told`: the pipe that it writes to."""

    def __init__(self, function: Callable[..., None], *words: object, folder: Path) -> None:
        pipe = folder / "told"
        os.mkfifo(pipe)
        self.process = forked(function, *map(str, words), output=pipe, environment=ENVIRONMENT)
        self.told = pipe.open()
        if not any("iteration 2/8" in printed for printed in self.told):
            self.process.join(PATIENCE)
            raise AssertionError(f"it ended with {self.process.exitcode} before its second iteration")

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def rest(self) -> str:
        """What else it writes until it ends."""
        with self.told:
            told = self.told.read()
        self.process.join(PATIENCE)
        return told


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("number", "status", "work"),
    [
        pytest.param(signal.SIGINT, 130, False, id="ctrl-c-without-work"),
        pytest.param(signal.SIGTERM, 143, True, id="sigterm-with-work", marks=pytest.mark.exhaustive),
    ],
)
def test_the_printed_command_ends_where_an_uninterrupted_training_does(
    number: signal.Signals, status: int, work: bool, trainable: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a schedule.json"
    directory = tmp_path / "work" if work else tmp_path / "a schedule.work"
    words = ["train", trainable, out, *MANY, *(["--work", directory] if work else [])]
    training = Training(module, "harmonica_rt.cli", *words, folder=tmp_path)
    training.send(number)
    told = training.rest()
    assert training.process.exitcode == status
    assert "Traceback" not in told
    kept = latest_checkpoint(directory)
    assert kept is not None
    assert kept.iteration >= 2
    *_, said, command = told.splitlines()
    path = directory / f"iteration-{kept.iteration:06d}.safetensors"
    assert said == f"interrupted after iteration {kept.iteration}, saved in {path}; to continue:"
    assert not out.exists()

    words = shlex.split(command)
    assert words[:4] == [*PROGRAM, "train"]
    done = run(*words[len(PROGRAM) :])
    assert done.exit_code == 0, done.output
    assert f"continuing after iteration {kept.iteration} of 8\n" in done.output
    assert run("train", trainable, tmp_path / "whole.json", *MANY).exit_code == 0
    assert Schedule.load(out) == Schedule.load(tmp_path / "whole.json")


def test_a_second_ctrl_c_ends_at_once(trainable: Path, tmp_path: Path) -> None:
    """Writing the checkpoint never ends, until Ctrl-C comes again. SIGTERM does not drop what is being written."""
    words = ["train", trainable, tmp_path / "s.json", *MANY, "--work", tmp_path / "work"]
    training = Training(whose_checkpoints_take_forever, *words, folder=tmp_path)
    training.send(signal.SIGINT)
    assert any("writing" in printed for printed in training.told)
    training.send(signal.SIGTERM)
    training.process.join(0.5)
    assert training.process.is_alive()
    training.send(signal.SIGINT)
    training.rest()
    assert training.process.exitcode == -signal.SIGINT


def test_under_torchrun_the_first_process_writes_the_checkpoint(trainable: Path, tmp_path: Path) -> None:
    words = ["train", trainable, tmp_path / "s.json", *MANY, "--work", tmp_path / "work"]
    training = Training(two_by_torchrun, "harmonica_rt.cli", *words, folder=tmp_path)
    training.send(signal.SIGTERM)
    told = training.rest()
    kept = latest_checkpoint(tmp_path / "work")
    assert kept is not None
    assert f"interrupted after iteration {kept.iteration}, saved in" in told
    assert told.count("to continue:") == 1
    assert "torchrun (with the options as before) -m harmonica_rt.cli train" in told


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_with_its_status(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(loading, "load_denoiser", stopped)
    before = [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        with signals.raised():
            result = run("sites", tmp_path)
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(each, handler)
    assert result.exit_code == status


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup` starts a process that ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_first_iteration_there_is_nothing_to_keep(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleProgress, "begin", stopped)
    result = run("train", trainable, tmp_path / "s.json", *MANY)
    assert result.exit_code == 130
    assert "interrupted before the first iteration ended: there is nothing to save\n" in result.output
    assert not list(tmp_path.iterdir())


def test_a_directory_beside_the_schedule_is_never_shared(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --work an interrupted training leaves those alone that were interrupted before it."""
    monkeypatch.setattr(ConsoleProgress, "iteration", interrupting_after(2))
    told = []
    for _ in range(2):
        result = run("train", trainable, tmp_path / "s.json", *MANY)
        assert result.exit_code == 130
        told.append(result.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.work", "s.work-2"]
    assert f"--work {tmp_path / 's.work'}\n" in told[0]
    assert f"--work {tmp_path / 's.work-2'}\n" in told[1]


def test_an_interruption_right_after_resuming_names_what_is_trun(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", trainable, tmp_path / "s.json", *MANY, "--work", tmp_path / "work"]
    monkeypatch.setattr(ConsoleProgress, "iteration", interrupting_after(2))
    assert run(*arguments).exit_code == 130
    monkeypatch.setattr(ConsoleProgress, "begin", interrupting)
    result = run(*arguments)
    assert result.exit_code == 130
    assert f"interrupted; iteration 2 is saved in {tmp_path / 'work'}; to continue:\n" in result.output


def interrupting(*_: Any) -> None:
    raise KeyboardInterrupt


def interrupting_after(iteration: int) -> Any:
    """In the place of `ConsoleProgress.iteration`: Ctrl-C as soon as one is told, which is kept."""

    def step(_: ConsoleProgress, record: Any) -> None:
        if record.iteration >= iteration:
            raise KeyboardInterrupt

    return step


def test_an_interrupted_call_of_train_has_its_state(tmp_path: Path) -> None:
    from harmonica_training import train
    from harmonica_training.checkpoint import load_checkpoint, save_checkpoint
    from harmonica_training.progress import Silent

    class Interrupting(Silent):
        def iteration(self, record: Any) -> None:
            if record.iteration == 4:
                raise KeyboardInterrupt

    chosen = config(steps=5, iterations=6, renew_every=2)
    with pytest.raises(
        TrainingInterrupted, match="interrupted after iteration 4; to continue, call train again with directory="
    ):
        train(dit(layers=3), chosen, directory=tmp_path / "kept", progress=Interrupting())
    with pytest.raises(TrainingInterrupted, match=r"its state is in `.checkpoint`") as caught:
        train(dit(layers=3), chosen, progress=Interrupting())
    stop = caught.value
    assert (stop.iteration, stop.path) == (4, None)
    assert isinstance(stop, KeyboardInterrupt)
    assert stop.checkpoint is not None
    file = save_checkpoint(tmp_path / "by hand", stop.checkpoint)
    same = latest_checkpoint(tmp_path / "kept")
    assert same is not None
    assert load_checkpoint(file).values == same.values
    whole = train(dit(layers=3), chosen)
    for directory in ("kept", "by hand"):
        assert train(dit(layers=3), chosen, directory=tmp_path / directory).schedule == whole.schedule
