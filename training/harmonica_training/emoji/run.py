"""The stages of a run: autoencoder, classifier, denoiser. Each resumes where it stopped; none is repeated."""

import dataclasses
import threading
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import T5Tokenizer

from harmonica_training.digits.autoencoder import decode, encode, normalise_latents
from harmonica_training.digits.files import read_torch
from harmonica_training.digits.run import claim_work
from harmonica_training.emoji.autoencoder import autoencoder_losses, build_autoencoder
from harmonica_training.emoji.classifier import EmojiClassifier, classifier_losses
from harmonica_training.emoji.config import EmojiConfig, EvaluationConfig
from harmonica_training.emoji.denoiser import TextToLatents, denoiser_losses
from harmonica_training.emoji.drawing import fresh_pictures
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.sampling import build_pipeline, sample, threads
from harmonica_training.emoji.scenes import draw_scene
from harmonica_training.emoji.sheet import save_sheet
from harmonica_training.emoji.streams import Use, stream
from harmonica_training.emoji.training import Course, LossParts, Progress, Run, Workers
from harmonica_training.emoji.vocabulary import build_tokenizer

SHEET_STEPS = 1000  # between two sample sheets
SHEET = EvaluationConfig(prompts=24, batch=24)


@dataclasses.dataclass(frozen=True)
class Trained:
    """All networks of a run with averaged parameters, in evaluation mode, and how far each stage has come."""

    model: TextToLatents
    tokenizer: T5Tokenizer
    vae: AutoencoderKL
    classifier: EmojiClassifier
    progress: dict[str, Progress]


def train(config: EmojiConfig, steps: int, glyphs: Glyphs, work: Path, workers: Workers) -> Trained:
    """Train what `work` lacks.

    Args:
        config: configuration of the training.
        steps: of the denoiser. A resumed run may have another number: its learning rate falls over the last fifth.
        glyphs: the emoji to draw.
        work: folder of the checkpoints and the sample sheets.
        workers: threads, and the flag to stop by.

    Raises:
        ValueError: `work` holds the stages of another configuration.
        StoppedError: told to stop; the same call goes on from there.
        TrainingError: a checkpoint is damaged.
    """
    claim_work(work, config)
    with threads(1):
        vae, of_vae = autoencoder_stage(config, glyphs, work, workers)
        classifier, of_classifier = classifier_stage(config, glyphs, work, workers)
        model, tokenizer = build_denoiser(config)
        run = Run(model, Course("denoiser", steps, config.rate, ema_decay=0.9995), work / "denoiser.pt")
        sheets = Sheets(config, glyphs, vae, tokenizer, work / "sheets")
        run.train(denoiser_losses(model, vae, tokenizer, config, glyphs), workers, sheets.watch)
        run.load_averages()
    progress = {"autoencoder": of_vae, "classifier": of_classifier, "denoiser": run.progress}
    return Trained(model, tokenizer, vae, classifier, progress)


def trained_so_far(config: EmojiConfig, glyphs: Glyphs, work: Path) -> Trained:
    """The networks of a run whose denoiser has a checkpoint, finished or not; trains nothing.

    Raises:
        ValueError: `work` holds the stages of another configuration.
        FileNotFoundError: the denoiser has no checkpoint yet.
        TrainingError: a checkpoint is damaged.
    """
    path = work / "denoiser.pt"
    steps = int(read_torch(path, ("step",))["step"])
    return train(config, steps, glyphs, work, Workers(1, threading.Event()))


def build_denoiser(config: EmojiConfig) -> tuple[TextToLatents, T5Tokenizer]:
    """The untrained networks and their tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(config.seed)
    return TextToLatents(config, len(tokenizer)), tokenizer


def autoencoder_stage(
    config: EmojiConfig, glyphs: Glyphs, work: Path, workers: Workers
) -> tuple[AutoencoderKL, Progress]:
    """The autoencoder, whose latents have mean 0 and deviation 1."""
    torch.manual_seed(config.seed)
    vae, stage = build_autoencoder(), config.autoencoder
    course = Course("autoencoder", stage.steps, stage.rate)
    progress = _finish(Run(vae, course, work / "autoencoder.pt"), autoencoder_losses(vae, config, glyphs), workers)
    rng = stream(config.seed, Use.AUTOENCODER, stage.steps)
    images = fresh_pictures(config.normalised_with, glyphs, rng).images
    normalise_latents(vae, images)
    if not (sheet := work / "sheets" / "autoencoder.png").exists():
        shown = images[: SHEET.prompts]
        save_sheet(torch.cat([shown, decode(vae, encode(vae, shown))]), sheet, columns=min(6, len(shown)))
    return vae, progress


def classifier_stage(
    config: EmojiConfig, glyphs: Glyphs, work: Path, workers: Workers
) -> tuple[EmojiClassifier, Progress]:
    """The classifier."""
    torch.manual_seed(config.seed)
    classifier, stage = EmojiClassifier(), config.classifier
    run = Run(classifier, Course("classifier", stage.steps, stage.rate), work / "classifier.pt")
    return classifier, _finish(run, classifier_losses(classifier, config, glyphs), workers)


def _finish(run: Run, losses: LossParts, workers: Workers) -> Progress:
    """Train to the end, then take the averaged parameters."""
    run.train(losses, workers)
    run.load_averages()
    return run.progress


class Sheets:
    """Samples the same prompts with the averaged parameters now and then, into `folder`."""

    def __init__(
        self, config: EmojiConfig, glyphs: Glyphs, vae: AutoencoderKL, tokenizer: T5Tokenizer, folder: Path
    ) -> None:
        rng = stream(config.seed, Use.PROMPTS)
        self.prompts = [draw_scene(glyphs.visible, rng).prompt for _ in range(SHEET.prompts)]
        self.folder = folder
        self.vae, self.tokenizer = vae, tokenizer
        self.model, _ = build_denoiser(config)

    def watch(self, run: Run) -> None:
        """Write a sheet if it is time."""
        if run.progress.steps % SHEET_STEPS:
            return
        self.model.load_state_dict(run.averages.state_dict(), strict=False)
        images = sample(build_pipeline(self.model.eval(), self.vae, self.tokenizer), self.prompts, SHEET)
        save_sheet(images, self.folder / f"{run.progress.steps:06d}.png", columns=6)
        (self.folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n")
