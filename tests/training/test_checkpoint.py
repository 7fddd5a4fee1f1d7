"""Checkpoints: exact, atomic, and nothing in them that runs."""

import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harmonica_training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from harmonica_training.errors import CheckpointError


def at(iteration: int) -> Checkpoint:
    return Checkpoint(iteration, {"logits": torch.full((3, 5), float(iteration))}, {"beta": 0.5})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and (
        left.contiguous().flatten().view(torch.uint8).equal(right.contiguous().flatten().view(torch.uint8))
    )


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    whole = torch.randn(4, 7)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "float32": torch.tensor([0.1, -0.0, 1e-45, math.inf, math.nan]),
        "float64": torch.randn(3, dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1, -1]),
        "generator": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(3.0),
        "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(whole),
        "view": whole.T,  # shares memory, and is not contiguous
        "expanded": whole[:1].expand(4, 7),
    }
    values = {
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0],
        "nested": {"none": None, "text": "naïve ✓", "int": 2**70, "flag": True, "empty": {}},
    }
    path = save_checkpoint(tmp_path / "new" / "folder", Checkpoint(7, tensors, values))
    assert path.name == "iteration-000007.safetensors"
    loaded = load_checkpoint(path)
    assert loaded.iteration == 7
    assert loaded.tensors.keys() == tensors.keys()
    assert all(same_bits(loaded.tensors[name], value.detach()) for name, value in tensors.items())
    assert json.dumps(loaded.values) == json.dumps(values)  # tells -0.0 from 0.0, and 1 from True

    empty = load_checkpoint(save_checkpoint(tmp_path, Checkpoint(0, {}, {})))
    assert (empty.iteration, empty.tensors, empty.values) == (0, {}, {})


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    """It is read here by safetensors alone; what it needs no unpickler for cannot run code."""
    data = save_checkpoint(tmp_path, at(3)).read_bytes()
    assert safetensors.torch.load(data)["logits"].equal(torch.full((3, 5), 3.0))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert len(data) == 8 + length + 3 * 5 * 4
    assert json.loads(header["__metadata__"]["harmonica_checkpoint"]) == {"iteration": 3, "values": {"beta": 0.5}}


@pytest.mark.parametrize(
    "values",
    [{"x": math.nan}, {"x": [math.inf]}, {"x": (1, 2)}, {1: "x"}, {"x": torch.ones(())}],
    ids=["nan", "infinity", "tuple", "number as key", "tensor"],
)
def test_values_that_would_not_come_back_are_refused(tmp_path: Path, values: dict) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path, Checkpoint(1, {}, values))
    assert names(tmp_path) == []


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for iteration in (5, 10, 999_999, 1_000_000):  # the last sorts before the others by name
        save_checkpoint(tmp_path, at(iteration))
    assert names(tmp_path) == ["iteration-1000000.safetensors", "iteration-999999.safetensors"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.iteration == 1_000_000
    save_checkpoint(tmp_path, at(1_000_000), keep=1)
    assert names(tmp_path) == ["iteration-1000000.safetensors"]
    with pytest.raises(ValueError, match="keep"):
        save_checkpoint(tmp_path, at(1_000_001), keep=0)


def test_later_checkpoints_are_neither_shadowed_nor_deleted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(20))
    with pytest.raises(CheckpointError, match=r"iteration-000020\.safetensors.*another directory"):
        save_checkpoint(tmp_path, at(10))
    assert names(tmp_path) == ["iteration-000020.safetensors"]


@pytest.mark.parametrize("killed_in", ["fsync", "replace"])
def test_kill_in_the_middle_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    save_checkpoint(tmp_path, at(10), keep=1)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, at(20), keep=1)
    (leftover,) = set(names(tmp_path)) - {"iteration-000010.safetensors"}
    os.truncate(tmp_path / leftover, 20)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.iteration == 10
    assert latest.tensors["logits"].equal(at(10).tensors["logits"])

    save_checkpoint(tmp_path, at(30), keep=1)
    assert names(tmp_path) == ["iteration-000030.safetensors"]


def test_old_ones_go_only_after_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, at(10), keep=1)
    events = []
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        real = getattr(owner, name)

        def noted(*args: object, name: str = name, real: object = real) -> None:
            events.append(name)
            real(*args)

        monkeypatch.setattr(owner, name, noted)
    save_checkpoint(tmp_path, at(20), keep=1)
    assert events == ["fsync", "replace", "fsync", "unlink"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_checkpoint(tmp_path)
    whole = save_checkpoint(tmp_path, at(1)).read_bytes()
    for broken in (b"", b"pickle or anything else", whole[:30], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            load_checkpoint(path)
    for metadata, said in (
        (None, "lacks harmonica_checkpoint_version, harmonica_checkpoint"),
        ({"harmonica_checkpoint_version": "1"}, "lacks harmonica_checkpoint$"),
        ({"harmonica_checkpoint_version": "9", "harmonica_checkpoint": "{}"}, "version 9 .* reads version 1"),
        ({"harmonica_checkpoint_version": "1", "harmonica_checkpoint": "{"}, "holds no JSON"),
        ({"harmonica_checkpoint_version": "1", "harmonica_checkpoint": "{}"}, "lacks the iteration"),
    ):
        path.write_bytes(safetensors.torch.save({"logits": torch.ones(2)}, metadata))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(path)


def test_broken_newest_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, at(10))
    newest = save_checkpoint(tmp_path, at(20))
    os.truncate(newest, newest.stat().st_size - 1)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.iteration == 10
    assert "iteration-000020" in caplog.text

    (tmp_path / "iteration-000010.safetensors").unlink()
    with pytest.raises(CheckpointError, match="iteration-000020"):  # to start anew is the caller's decision
        latest_checkpoint(tmp_path)
