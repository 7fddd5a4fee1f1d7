"""The whole run: classifier, autoencoder, latents, denoiser, saved model, figures. Finished stages are not repeated."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.untrusted.text import one_line
from harmonica_training.digits.autoencoder import decode, encode, train_autoencoder
from harmonica_training.digits.classifier import (
    DigitClassifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from harmonica_training.digits.config import DigitsConfig, EvaluationConfig
from harmonica_training.digits.data import DigitsSplit, augment, load_split
from harmonica_training.digits.denoiser import DenoiserTraining, load_averaged, train_denoiser
from harmonica_training.digits.evaluate import Evaluation, evaluate
from harmonica_training.digits.export import provenance, save_model, write_card
from harmonica_training.digits.files import read_json, read_torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)


def claim_work(work: Path, config: "DataclassInstance") -> None:
    """Make `work` the folder of this configuration.

    Raises:
        ValueError: it holds the stages of another configuration.
        TrainingError: the file that records its configuration is damaged.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "config.json"
    wanted = dataclasses.asdict(config)
    if path.exists() and (found := read_json(path)) != wanted:
        differing = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
        raise ValueError(
            f"{work} holds stages of another configuration, which differs in {one_line(', '.join(differing))}; "
            "pass another --work, or delete it"
        )
    write_atomically(path, json.dumps(wanted, indent=2) + "\n")


def classifier_stage(config: DigitsConfig, data: DigitsSplit, work: Path) -> DigitClassifier:
    """The classifier in `work`, trained if it is not there."""
    directory = work / "classifier"
    if not (directory / "model.safetensors").exists():
        save_classifier(train_classifier(config, data), directory)
    return load_classifier(directory)


def autoencoder_stage(config: DigitsConfig, data: DigitsSplit, work: Path) -> tuple[AutoencoderKL, dict[str, float]]:
    """The autoencoder in `work`, trained if it is not there, with its final loss and seconds."""
    directory = work / "autoencoder"
    record = directory / "training.json"
    if not record.exists():
        started = time.monotonic()
        trained = train_autoencoder(config, data)
        trained.model.save_pretrained(str(directory))
        seconds = time.monotonic() - started
        write_atomically(record, json.dumps({"final_loss": trained.final_loss, "seconds": seconds}))
    model = AutoencoderKL.from_pretrained(str(directory))
    if not isinstance(model, AutoencoderKL):
        raise TypeError(f"expected an AutoencoderKL in {directory}, got {type(model).__name__}")
    return model.eval(), read_json(record)


def latents_stage(config: DigitsConfig, data: DigitsSplit, vae: AutoencoderKL, work: Path) -> tuple[Tensor, Tensor]:
    """Latents [N, 4, S, S] of the augmented training images and labels [N]; encoded if not in `work`."""
    path = work / "latents.pt"
    if not path.exists():
        logger.info("encoding %d copies of the training images", config.augmentations)
        generator = torch.Generator().manual_seed(config.seed)
        parts = [encode(vae, augment(data.train_images, generator)) for _ in range(config.augmentations)]
        latents = {"latents": torch.cat(parts), "labels": data.train_labels.repeat(config.augmentations)}
        partial = path.with_suffix(".partial")
        torch.save(latents, partial)
        partial.replace(path)
    saved = read_torch(path, ("latents", "labels"))
    return saved["latents"], saved["labels"]


def train_and_save(
    config: DigitsConfig,
    evaluation_config: EvaluationConfig,
    out: Path,
    work: Path,
    command: str,
    finish: bool = True,
) -> Evaluation:
    """Train what `work` lacks, write the model into `out`, and measure it.

    Args:
        config: configuration of the training.
        evaluation_config: configuration of the measurement.
        out: directory of the model; its files are overwritten.
        work: directory of the stages; an interrupted run resumes there.
        command: written to the provenance.
        finish: False takes the denoiser's last checkpoint as it is, to see how far it has come.

    Raises:
        ValueError: `work` holds the stages of another configuration.
        FileNotFoundError: `finish` is False and there is no checkpoint.
    """
    claim_work(work, config)
    data = load_split(config.image_size)
    classifier = classifier_stage(config, data, work)
    vae, vae_record = autoencoder_stage(config, data, work)
    latents, labels = latents_stage(config, data, vae, work)
    checkpoint = work / "denoiser.pt"
    trained = train_denoiser(config, latents, labels, checkpoint) if finish else load_averaged(config, checkpoint)
    record = training_record(trained, vae, vae_record, data)
    save_model(out, trained.model, vae, classifier)
    evaluation, _ = evaluate(out, data, evaluation_config)
    write_card(
        out,
        provenance(command, config, evaluation_config, evaluation, record),
        record["denoiser"]["parameters"],
    )
    return evaluation


def training_record(
    trained: DenoiserTraining, vae: AutoencoderKL, vae_record: dict[str, float], data: DigitsSplit
) -> dict[str, Any]:
    """Sizes, losses and times of the trained networks, ready for JSON."""
    decoded = decode(vae, encode(vae, data.test_images))
    return {
        "autoencoder": {
            "parameters": sum(parameter.numel() for parameter in vae.parameters()),
            "final_loss": round(vae_record["final_loss"], 5),
            "held_out_mean_absolute_error": round(float((decoded - data.test_images).abs().mean()), 5),
            "seconds": round(vae_record["seconds"]),
        },
        "denoiser": {
            "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
            "steps": trained.steps,
            "first_loss": round(trained.losses[0], 5),
            "final_loss": round(trained.losses[-1], 5),
            "loss_per_500_steps": [round(loss, 5) for loss in trained.losses[4::5]],
            "seconds": round(trained.seconds),
            "resumed_at_steps": trained.resumed,
        },
    }
