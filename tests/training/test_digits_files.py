"""Files of the digits' training that are damaged: one kind of error, with the file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harmonica_training.digits import load_classifier
from harmonica_training.digits.config import DigitsConfig
from harmonica_training.digits.denoiser import STATE, load_averaged
from harmonica_training.digits.files import read_json, read_torch
from harmonica_training.digits.run import claim_work
from harmonica_training.errors import TrainingError
from tests.schedule.test_routers import Payload

CLASSIFIER = Path(__file__).parents[2] / "harmonica_rt" / "demo" / "digits-dit" / "classifier"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 100_000, "JSON nested too deep"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[]", "expected a JSON object, got a list"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    for reader in (read_json, lambda path: claim_work(path.parent, DigitsConfig.quick(0))):
        with pytest.raises(TrainingError, match=message) as caught:
            reader(tmp_path / "config.json")
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_a_malformed_file_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latents.pt"
    torch.save({"latents": torch.ones(2), "labels": torch.ones(2)}, path)
    assert read_torch(path, ("latents", "labels"))["latents"].equal(torch.ones(2))
    with pytest.raises(TrainingError, match=r"latents\.pt: expected a dict with latents, more"):
        read_torch(path, ("latents", "more"))
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-100], whole[:200], b"\x80\x02]q\x00."):
        path.write_bytes(data)
        with pytest.raises(TrainingError, match=r"latents\.pt: "):
            read_torch(path, ("latents", "labels"))
    torch.save({"latents": Payload(tmp_path / "made"), "labels": 1}, path)
    with pytest.raises(TrainingError, match=r"latents\.pt: not a readable file of torch"):
        read_torch(path, ("latents", "labels"))
    assert not (tmp_path / "made").exists()


def test_a_denoiser_of_another_model_is_refused(tmp_path: Path) -> None:
    state: dict[str, object] = {name: {} for name in STATE}
    for averages in ({"proj.weight": torch.ones(2)}, 3, None):
        torch.save({**state, "averages": averages}, tmp_path / "denoiser.pt")
        with pytest.raises(TrainingError, match=r"denoiser\.pt is of another model, or damaged"):
            load_averaged(DigitsConfig.quick(0), tmp_path / "denoiser.pt")


def edit(change: dict[str, Any]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edited


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (edit({"version": 2}), "config.json", "expected a classifier config of version 1"),
        (edit({"more": 1}), "config.json", "expected a classifier config"),
        (edit({"channels": "\x1b[2J"}), "config.json", "expected a classifier config"),
        (edit({"channels": 10**9}), "config.json", "each 1 ... 1024"),
        (edit({"features": 0}), "config.json", "each 1 ... 1024"),
        (edit({"features": 8}), "model.safetensors", "not the parameters of this model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "model.safetensors", "not the parameters"),
    ],
    ids=["version", "field", "text", "huge", "nothing", "other", "bytes"],
)
def test_a_damaged_classifier_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    shutil.copytree(CLASSIFIER, tmp_path, dirs_exist_ok=True)
    load_classifier(tmp_path)
    damage(tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        load_classifier(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert str(caught.value).replace("\n", "").isprintable()
