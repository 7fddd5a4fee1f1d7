"""Training checkpoints, read by a training that resumes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import changed, damaged_json
from benchmarks.fuzz.safetensors_damage import damaged_safetensors
from harmonica_training import TrainConfig
from harmonica_training.errors import CheckpointError, TrainingError
from harmonica_training.harmonica import HarmoniCa
from harmonica_training.setting import Setting
from harmonica_training.trainer import Iterations
from harmonica_training.training_state import TrainingState
from tests.tiny import dit

STEPS, FILE = 4, "iteration-000002.safetensors"


@functools.cache
def _training() -> TrainingState:
    """A training that never takes a step; it only resumes from one checkpoint after the other."""
    setting = Setting(dit(), TrainConfig(steps=STEPS, batch=2, guidance=1.0, target_cur=0.3), None)
    return TrainingState(setting, HarmoniCa(setting), None)


@functools.cache
def _identity() -> str:
    return json.dumps(_training().values()["identity"])


def content(rng: Random) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a valid checkpoint."""
    sites = len(_training().setting.sites)
    drawn = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(STEPS, sites, generator=drawn)
    tensors = {"logits": logits, "prices": torch.rand(STEPS, sites, generator=drawn), "lambda": torch.ones(STEPS)}
    for step in range(1, STEPS):
        tensors |= {f"moment.{step}": torch.rand(2, sites, generator=drawn), f"count.{step}": torch.tensor(2.0)}
    tensors |= {"best.computes": torch.ones(STEPS, sites, dtype=torch.bool), "best.logits": logits.clone()}
    values = {
        "identity": json.loads(_identity()),
        "steering": {"beta": 0.1, "saved": rng.choice((None, 0.25))},
        "settling": {"logs": [-1.5], "next": 0, "vain": 1},
    }
    return tensors, {"iteration": 2, "values": values}


def _metadata(record: str) -> dict[str, str]:
    return {"harmonica_checkpoint_version": "1", "harmonica_checkpoint": record}


def valid(rng: Random) -> bytes:
    """A checkpoint that the training can resume from."""
    tensors, record = content(rng)
    return safetensors.torch.save(_like(tensors), _metadata(json.dumps(record)))


def damaged(rng: Random) -> bytes:
    """A checkpoint with a changed record, or damaged as a safetensors file."""
    tensors, record = content(rng)
    if rng.random() < 0.4:
        values = record["values"]
        if rng.random() < 0.7:
            name = rng.choice(("steering", "settling"))
            values[name] = changed(rng, values[name], times=rng.choice((1, 1, 2)))
        else:
            record = changed(rng, record)
        text = json.dumps(record)
        return safetensors.torch.save(_like(tensors), _metadata(text.encode("utf-8", "replace").decode()))
    if rng.random() < 0.2:
        text = damaged_json(rng, record).decode("utf-8", "replace")
        return safetensors.torch.save(_like(tensors), _metadata(text))
    return damaged_safetensors(rng, _like(tensors), _metadata(json.dumps(record)))


def _like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the dtypes that the training uses."""
    here = _training().tensors()
    return {name: tensor.to(here[name].dtype) if name in here else tensor for name, tensor in tensors.items()}


def read(path: Path) -> object:
    """Resume from the checkpoint."""
    training = _training()
    training.optimizer.state.clear()
    training.settling.best = None
    training.resume(path.parent)
    return training


def check(result: object, path: Path) -> None:
    """All loaded tensors are finite, and give a schedule whose first step computes."""
    assert isinstance(result, TrainingState)
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors().values())
    assert Iterations(result).result(()).schedule.compute[0].all()


FORMAT = Format(
    name="checkpoint",
    file=FILE,
    errors=(CheckpointError, TrainingError),
    valid=valid,
    damaged=damaged,
    read=read,
    check=check,
)
