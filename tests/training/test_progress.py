"""What a run shows: a bar or a few lines, and event files that TensorBoard reads back."""

import io
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harmonica_training import tensorboard_log
from harmonica_training.console_progress import PLAIN_LINES, ConsoleProgress
from harmonica_training.errors import TrainingError
from harmonica_training.progress import IterationRecord, Progress, Several, Silent
from harmonica_training.tensorboard_log import CELL, TensorBoardLog

SCORES = np.array([[1.0, 1.0, 1.0], [0.0, 0.5, 0.25]])
COMPUTE = SCORES > 0.3


def record(iteration: int) -> IterationRecord:
    return IterationRecord(
        iteration, loss=3.0 / iteration, mse=2.0, penalty=0.5, beta=0.001, cur=0.25, speedup=1.5, seconds=0.125
    )


def run(progress: Progress, total: int, done: int = 0, until: int | None = None) -> None:
    """Report as a training run does, which is killed after iteration `until`."""
    progress.begin(total, done)
    for iteration in range(done + 1, (until or total) + 1):
        if iteration % 5 == 1:
            progress.renewed(iteration, [10.0 * iteration + step for step in range(12)])
        progress.iteration(record(iteration))
        progress.schedule(iteration, SCORES, COMPUTE)
    if until is None:
        progress.end()


@pytest.mark.parametrize(("total", "done", "lines"), [(7, 0, 7), (20, 0, 20), (21, 0, 11), (1003, 100, 20)])
def test_plain_lines_are_few_and_end_with_the_last_iteration(total: int, done: int, lines: int) -> None:
    out = io.StringIO()
    run(ConsoleProgress(Console(file=out, width=40)), total, done)
    printed = out.getvalue().splitlines()
    if done:
        assert printed.pop(0) == f"continuing after iteration {done} of {total}"
    assert len(printed) == lines <= PLAIN_LINES
    assert printed[-1].startswith(f"iteration {total}/{total}  0:00:00 left  loss ")
    assert printed[-1].endswith("CUR 25.0%  speed-up 1.50x  beta 0.001")


def test_a_run_that_is_over_already_says_so() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=100))
    progress.begin(total=3, done=15)
    progress.end()
    assert out.getvalue() == "15 iterations are done already, and 3 are asked for: nothing is left to learn\n"


def test_time_left_is_that_of_the_iterations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out))
    clock = iter([1000.0, 1020.0])  # two iterations took ten seconds each
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress.begin(total=862, done=500)
    progress._every = 2
    progress.iteration(record(502))
    assert "1:00:00 left" in out.getvalue()


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    run(ConsoleProgress(Console(file=out, force_terminal=True, width=80)), total=30, done=10)
    shown = out.getvalue()
    assert "30/30" in shown
    assert "speed-up 1.50x" in shown
    assert shown.count("iteration") == shown.count("continuing after iteration 10 of 30") == 1


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    run(log, total=6)
    events = read(tmp_path)
    tags = {"loss/total", "loss/mse", "loss/penalty", "beta", "cur", "speedup", "seconds"}
    tags |= {f"lambda/step_{step:02}" for step in range(12)}
    assert set(events.Tags()["scalars"]) == tags
    assert points(events, "loss/total") == [(i, pytest.approx(3.0 / i)) for i in range(1, 7)]
    assert [points(events, tag)[0][1] for tag in ("loss/mse", "loss/penalty", "cur", "speedup", "seconds")] == [
        2.0, 0.5, 0.25, 1.5, 0.125,
    ]  # fmt: skip
    assert points(events, "lambda/step_07") == [(1, 17.0), (6, 67.0)]
    for tag, values in (("scores", SCORES), ("schedule", COMPUTE)):
        image = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
        assert image.size == (3 * CELL, 2 * CELL)
        pixels = np.asarray(image.convert("L"))
        assert np.array_equal(pixels[CELL // 2 :: CELL, CELL // 2 :: CELL], np.rint(values * 255))
        assert len(np.unique(pixels[:CELL, -CELL:])) == 1

    with pytest.raises(TrainingError, match="begin"):
        log.iteration(record(7))


def test_resumed_run_continues_the_log_without_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = TensorBoardLog(tmp_path)
    run(killed, total=12, until=8)  # the last checkpoint was after 5
    assert [step for step, _ in points(read(tmp_path), "loss/total")] == list(range(1, 9))  # all is on disk
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2.0)  # event files sort by the second they were begun in
    run(TensorBoardLog(tmp_path), total=12, done=5)
    events = read(tmp_path)
    assert [step for step, _ in points(events, "loss/total")] == list(range(1, 13))
    assert points(events, "lambda/step_00") == [(1, 10.0), (6, 60.0), (11, 110.0)]
    assert [image.step for image in events.Images("schedule")] == list(range(1, 13))
    killed.end()


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainingError, match=r"pip install 'harmonica-rt\[train\]'"):
        TensorBoardLog(tmp_path)


def test_several_hand_on_to_each_in_order() -> None:
    said: list[tuple[object, ...]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self, total: int, done: int) -> None:
            said.append((self.name, "begin", total, done))

        def iteration(self, record: IterationRecord) -> None:
            said.append((self.name, record))

        def renewed(self, iteration: int, weights: object) -> None:
            said.append((self.name, "renewed", iteration))

        def schedule(self, iteration: int, scores: object, compute: object) -> None:
            said.append((self.name, "schedule", iteration, scores is SCORES, compute is COMPUTE))

        def end(self) -> None:
            said.append((self.name, "end"))

    run(Several(Noted("a"), Silent(), Noted("b")), total=1)
    one = [("begin", 1, 0), ("renewed", 1), (record(1),), ("schedule", 1, True, True), ("end",)]
    assert said == [(name, *words) for words in one for name in "ab"]


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_log_that_cannot_be_closed_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an interruption that left the lock of TensorBoard's queue held."""
    released = threading.Event()
    written = TensorBoardLog(tmp_path)
    written.begin(2, 0)
    written.iteration(record(1))
    writer = written._writer
    assert writer is not None
    close = writer.close
    monkeypatch.setattr(writer, "close", released.wait)
    monkeypatch.setattr(tensorboard_log, "PATIENCE", 0.05)
    written.end()
    assert "did not close its file" in caplog.text
    released.set()
    close()
