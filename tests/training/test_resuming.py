"""What a training goes on from: a checkpoint that holds what a training can have left, the same in all processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from harmonica_training import TrainConfig, distributed, train
from harmonica_training.checkpoint import load_checkpoint
from harmonica_training.errors import CheckpointError, TrainingError
from harmonica_training.progress import IterationRecord, Silent
from tests import tiny

CONFIG = TrainConfig(steps=4, iterations=2, batch=2, guidance=1.0, target_cur=0.3, validation_batches=1)


def pipeline() -> Any:
    return tiny.built(tiny.dit)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a training after its last iteration."""
    folder = tmp_path_factory.mktemp("begun")
    train(pipeline(), CONFIG, directory=folder)
    [path] = folder.iterdir()
    return path.read_bytes()


def edited(data: bytes, folder: Path, tensors: dict[str, Any], values: dict[str, Any]) -> Path:
    """The checkpoint with other tensors and values; None takes one out."""
    path = folder / "iteration-000002.safetensors"
    path.write_bytes(data)
    found = load_checkpoint(path)
    changed = {name: value for name, value in {**found.tensors, **tensors}.items() if value is not None}
    record = {"iteration": 2, "values": {**found.values, **values}}
    header = {"harmonica_checkpoint_version": "1", "harmonica_checkpoint": json.dumps(record)}
    path.write_bytes(safetensors.torch.save(changed, header))
    return path


NAN = float("nan")
DAMAGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nan-logits": ({"logits": torch.full((4, 4), NAN)}, {}, "logits holds numbers that are not finite"),
    "infinite-prices": ({"prices": torch.full((4, 4), torch.inf)}, {}, "prices holds numbers that are not finite"),
    "nan-lambda": ({"lambda": torch.full((4,), NAN)}, {}, "lambda"),
    "nan-moments": ({"moment.1": torch.full((2, 4), NAN)}, {}, "moment.1 holds numbers that are not finite"),
    "negative-moments": ({"moment.1": torch.full((2, 4), -1.0)}, {}, "moment.1 or count.1 is not the state"),
    "nan-count": ({"count.1": torch.tensor(NAN)}, {}, "count.1 holds numbers that are not finite"),
    "no-count": ({"count.1": None}, {}, "count.1 is missing"),
    "nan-best": ({"best.logits": torch.full((4, 4), NAN)}, {}, "best.logits holds numbers that are not finite"),
    "no-best": ({"best.logits": None}, {}, "best.logits is missing"),
    "best-reuses-first": ({"best.computes": torch.zeros(4, 4, dtype=torch.bool)}, {}, "reuses at a step that must"),
    "no-logits": ({"logits": None}, {}, "logits is missing"),
    "fewer-logits": ({"logits": torch.zeros(3, 4)}, {}, "logits: expected shape (4, 4) of torch.float32, got (3, 4)"),
    "half-logits": ({"logits": torch.zeros(4, 4).half()}, {}, "got (4, 4) of torch.float16"),
    "beta-text": ({}, {"steering": {"beta": "\x1b[2J", "saved": None}}, "steering: expected beta and saved"),
    "steering-list": ({}, {"steering": []}, "steering: expected beta and saved"),
    "settling-null": ({}, {"settling": None}, "settling: expected logs, next and vain"),
    "settling-next": ({}, {"settling": {"logs": None, "next": 10**9, "vain": 0}}, "settling: expected logs"),
    "settling-logs": ({}, {"settling": {"logs": ["a"], "next": 0, "vain": 0}}, "settling: expected logs of errors"),
    "settling-empty": ({}, {"settling": {"logs": [], "next": 0, "vain": 0}}, "settling: expected logs of errors"),
}


@pytest.mark.parametrize(("tensors", "values", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused(
    begun: bytes, tmp_path: Path, tensors: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    edited(begun, tmp_path, tensors, values)
    with pytest.raises(CheckpointError) as caught:
        train(pipeline(), CONFIG, directory=tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/iteration-000002.safetensors is damaged: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_undamaged_checkpoint_is_continued(begun: bytes, tmp_path: Path) -> None:
    edited(begun, tmp_path, {}, {})
    assert train(pipeline(), CONFIG, directory=tmp_path).history == ()


def test_processes_that_start_from_different_states_all_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = distributed.gather

    def another(numbers: list[int], device: torch.device) -> list[list[int]]:
        return [*gather(numbers, device), [numbers[0], numbers[1] ^ 1], [-1, 0]]

    monkeypatch.setattr(distributed, "gather", another)
    with pytest.raises(TrainingError, match=r"process 0 at iteration 0 .*process 1 at .*process 2 cannot resume"):
        train(pipeline(), CONFIG)


PROCESS = """
import sys
from tests.training.test_resuming import CONFIG, pipeline
from harmonica_training import train
from harmonica_training.errors import TrainingError
try:
    train(pipeline(), CONFIG, directory=sys.argv[1])
except TrainingError as error:
    print(error)
"""


@pytest.mark.exhaustive  # the test above has its numbers gathered by hand; cli/test_train.py gathers them for real
def test_two_processes_with_different_checkpoints_both_stop(begun: bytes, tmp_path: Path) -> None:
    """On nodes with disks of their own: one has the checkpoint, the other has none."""
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    edited(begun, tmp_path / "0", {}, {})
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path / str(rank)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all("the processes do not start alike: process 0 at iteration 2" in text for text in said), said
    assert all("process 1 at iteration 0" in text for text in said)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_an_interrupted_training_is_saved_before_its_log_is_closed(tmp_path: Path) -> None:
    """Closing may take long, and a second Ctrl-C meanwhile loses nothing and waits for nothing."""

    class SlowToClose(Silent):
        """Is interrupted after the first iteration, and again while it is closed."""

        found: tuple[str, ...] = ()

        def iteration(self, record: IterationRecord) -> None:
            if record.iteration == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            self.found = tuple(path.name for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    shown = SlowToClose()
    with pytest.raises(KeyboardInterrupt):
        train(pipeline(), CONFIG, directory=tmp_path, progress=shown)
    assert shown.found == ("iteration-000001.safetensors",)
