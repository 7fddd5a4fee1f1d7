"""The emoji model: a tiny run that is interrupted, and what a run writes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the emoji model is a diffusers pipeline")
pytest.importorskip("transformers", reason="its prompts have a T5 encoder")

import harmonica_rt as hrt
from harmonica_training.emoji import (
    EmojiConfig,
    EvaluationConfig,
    evaluate,
    export,
    load_classifier,
    load_pipeline,
    load_prompts,
    sample,
    train,
    trained_so_far,
)
from harmonica_training.emoji import __main__ as command_line
from harmonica_training.emoji.sampling import threads
from harmonica_training.emoji.training import Course, StoppedError, Workers
from harmonica_training.emoji.vocabulary import TOKENS
from harmonica_training.errors import TrainingError
from tests.training.emoji_squares import squares

CONFIG = EmojiConfig.quick()
MEASURED = EvaluationConfig(prompts=6, steps=2, batch=6)
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread_and_quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Operators this small gain nothing from threads, and lose much to them on a busy machine."""
    caplog.set_level(logging.ERROR)
    with threads(1):
        yield


def workers(threads: int = 1) -> Workers:
    return Workers(threads, threading.Event())


class EverySecondStep(threading.Event):
    """A flag that is set every second time that it is looked at; the loop looks once per step."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks % 2 == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("work")
    train(CONFIG, STEPS, squares(), folder, workers())
    return folder


@pytest.fixture(scope="module")
def model(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of that run as a directory."""
    out = tmp_path_factory.mktemp("model")
    with threads(1):
        export(trained_so_far(CONFIG, squares(), work), squares(), CONFIG, MEASURED, out, command="test")
    return out


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(work: Path, tmp_path: Path) -> None:
    stops = 0
    while True:  # with another number of threads, too
        try:
            train(CONFIG, STEPS, squares(), tmp_path, Workers(2, EverySecondStep()))
            break
        except StoppedError:
            stops += 1
    assert stops == 3  # in the middle of each of three stages
    for name in ("autoencoder.pt", "classifier.pt", "denoiser.pt"):
        whole, interrupted = (torch.load(folder / name, weights_only=True) for folder in (work, tmp_path))
        assert interrupted["step"] == whole["step"] == STEPS
        assert interrupted["resumed"] == [2]
        assert interrupted["losses"] == whole["losses"]
        for part in ("model", "averages"):
            assert interrupted[part].keys() == whole[part].keys()
            assert all(torch.equal(value, interrupted[part][key]) for key, value in whole[part].items())
        before, after = whole["optimizer"]["state"], interrupted["optimizer"]["state"]
        assert all(torch.equal(value, after[index][key]) for index in before for key, value in before[index].items())


def test_every_parameter_learns(work: Path) -> None:
    tokens = 0
    for name in ("autoencoder.pt", "classifier.pt", "denoiser.pt"):
        state = torch.load(work / name, weights_only=True)
        moments = [entry["exp_avg_sq"] for entry in state["optimizer"]["state"].values()]
        assert len(moments) == len(state["averages"])
        tokens += sum(int((moment == 0).all()) for moment in moments)
    assert tokens == 0


def test_work_of_another_configuration_and_damaged_checkpoints_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers"):
        train(dataclasses.replace(CONFIG, layers=3), STEPS, squares(), work, workers())
    with pytest.raises(FileNotFoundError):
        trained_so_far(CONFIG, squares(), tmp_path)
    (tmp_path / "autoencoder.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"autoencoder\.pt"):
        train(CONFIG, STEPS, squares(), tmp_path, workers())


def test_the_learning_rate_rises_stays_and_falls() -> None:
    course = Course("any", steps=1000, rate=2.0)
    assert course.rate_at(0) == pytest.approx(2.0 / 50)
    assert course.rate_at(49) == course.rate_at(800) == pytest.approx(2.0)
    assert course.rate_at(900) == pytest.approx(1.0)
    assert course.rate_at(999) == pytest.approx(2.0 / 200)


def test_the_exported_pipeline_loads_samples_and_compiles(model: Path) -> None:
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
    call: dict[str, Any] = {"prompt": ["a red heart left of an octopus on blue"], "use_resolution_binning": False}

    def latents(steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        result = pipe(**call, num_inference_steps=steps, generator=generator, output_type="latent").images
        assert isinstance(result, torch.Tensor)
        return result

    plain = latents(4)
    assert plain.shape == (1, 8, 16, 16)
    sites = hrt.find_sites(pipe.transformer)
    hrt.compile(pipe, hrt.Schedule.all_compute(steps=4, sites=sites), lowering="plain")
    assert torch.equal(latents(4), plain)
    hrt.uncompile(pipe)
    report = hrt.verify(
        pipe, hrt.Schedule.every(2, steps=4, sites=sites), lowering="plain", num_inference_steps=4, **call
    )
    assert report.ok
    assert report.trajectory_same_bits
    (image,) = pipe(**call, num_inference_steps=2).images
    assert image.size == (64, 64)


def test_padding_changes_nothing(model: Path) -> None:
    pipe = load_pipeline(model)
    call: dict[str, Any] = {"use_resolution_binning": False, "num_inference_steps": 2, "output_type": "latent"}
    short, long = (
        pipe("an octopus on blue", max_sequence_length=n, generator=torch.Generator().manual_seed(0), **call).images
        for n in (TOKENS, 120)
    )
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_a_model_is_measured_and_says_how_it_was_made(model: Path) -> None:
    scenes = load_prompts(model)
    assert len(scenes) == MEASURED.prompts
    result, images = evaluate(model, squares(), MEASURED, scenes)
    assert images.shape == (MEASURED.prompts, 3, 64, 64)
    assert torch.equal(images, sample(load_pipeline(model), [scene.prompt for scene in scenes], MEASURED))
    record = json.loads((model / "PROVENANCE.json").read_text())
    assert record["evaluation"] == {**dataclasses.asdict(MEASURED), **dataclasses.asdict(result)}
    assert record["training"]["denoiser"]["steps"] == STEPS
    card = (model / "README.md").read_text()
    assert str(result.drawn.background) in card
    for text in (*model.rglob("*.json"), *model.rglob("*.md")):
        assert not any(root in text.read_text() for root in ("/tmp", "/work", "/root", "/home"))


def test_a_damaged_classifier_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"version": 1, "channels": 7}')
    with pytest.raises(TrainingError, match="multiple of 8"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text((model / "classifier" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"model\.safetensors"):
        load_classifier(tmp_path)


def test_the_command_stops_at_sigterm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert arguments[-1].stop.wait(10.0)
        raise StoppedError("stopped after 0 steps")

    monkeypatch.setattr(command_line, "find_font", lambda path: path)
    monkeypatch.setattr(command_line, "load_glyphs", lambda *_: squares())
    monkeypatch.setattr(command_line, "train", stopped)
    try:
        with pytest.raises(SystemExit, match="resumes"):
            command_line.main(["train", "--quick", "--work", str(tmp_path)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_configurations_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="emoji"):
        EmojiConfig(emoji=2)
    with pytest.raises(ValueError, match="heads"):
        EmojiConfig(heads=0)
    with pytest.raises(ValueError, match="prompts"):
        EvaluationConfig(prompts=0)
