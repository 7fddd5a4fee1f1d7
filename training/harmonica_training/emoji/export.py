"""Writes trained networks as a diffusers directory, with classifier, prompts, model card and provenance."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harmonica_rt.schedule.files import write_atomically
from harmonica_training.digits.export import PROVENANCE, directory_bytes
from harmonica_training.emoji.classifier import save_classifier
from harmonica_training.emoji.config import EmojiConfig, EvaluationConfig
from harmonica_training.emoji.evaluate import PROMPTS, Evaluation, evaluate, evaluation_scenes, prompts_text
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.run import Trained
from harmonica_training.emoji.sampling import build_pipeline
from harmonica_training.emoji.scenes import SIDE
from harmonica_training.emoji.training import Progress

FORMAT_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow", "safetensors")

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---

# emoji-pixart

Text to image, small enough to ship with harmonica-rt and to run on a CPU: a PixArt-alpha pipeline with a denoiser of
{parameters:.1f} M parameters, {layers} blocks of width {width} and 64 tokens, and a T5 encoder trained along with it;
{size_mb:.1f} MB, mostly in float16. It draws one to three of {emoji} emoji, arranged and on a background as the prompt
says:

```python
from diffusers import PixArtAlphaPipeline

pipe = PixArtAlphaPipeline.from_pretrained("harmonica_rt/demo/emoji-pixart")
image = pipe("a red heart left of an octopus on blue", use_resolution_binning=False).images[0]
```

`use_resolution_binning=False` is needed because the pipeline's table of sizes begins at 256 pixels; these pictures have
{side}x{side}. `max_sequence_length=20` holds every prompt and saves time.

## Measured

On this saved model, loaded in float32 on a CPU, {prompts} prompts, {steps} steps of DPM-Solver++, guidance {guidance}.
A classifier trained on fresh drawings finds what was asked for in this share of the pictures (95 % interval):

| part | generated | drawn | drawn, through the autoencoder |
| --- | --- | --- | --- |
{table}

Frechet distance of the classifier's features to fresh drawings: {frechet:.3f}; of other fresh drawings:
{frechet_drawn:.3f}.

`prompts.json` has the prompts; `classifier/` the classifier (`harmonica_training.emoji.load_classifier`). How the model
was made, to the seed and the losses, is in `PROVENANCE.json`.

## Data

Pictures drawn without end by `harmonica_training.emoji` with Noto Color Emoji (Copyright Google Inc., SIL Open Font
License 1.1; Debian's `fonts-noto-color-emoji`). The font is not included. Its licence does not extend to documents made
with it. Names are those of Unicode.

## Limits

It knows the words of its prompts and no others. It is for tests, demonstrations and benchmarks of feature caching.
"""


def export(
    trained: Trained, glyphs: Glyphs, config: EmojiConfig, measured: EvaluationConfig, out: Path, command: str
) -> Evaluation:
    """Write the model into `out`, measure what was written, and record both.

    Args:
        trained: the networks; denoiser and autoencoder become float16.
        glyphs: the emoji, to draw pictures to compare with.
        config: that of the training.
        measured: configuration of the measurement.
        out: directory of the model; its files are overwritten.
        command: written to the provenance.
    """
    parameters = {
        "autoencoder": trained.vae.num_parameters(),
        "classifier": sum(parameter.numel() for parameter in trained.classifier.parameters()),
        "denoiser": trained.model.transformer.num_parameters(),
        "text encoder": trained.model.text_encoder.num_parameters(),
    }
    save_model(out, trained)
    scenes = evaluation_scenes(glyphs, measured)
    write_atomically(out / PROMPTS, prompts_text(scenes))
    evaluation, _ = evaluate(out, glyphs, measured, scenes)
    record = {
        "version": FORMAT_VERSION,
        "script": "training/harmonica_training/emoji",
        "command": command,
        "data": {
            "source": "drawn with Noto Color Emoji (SIL Open Font License 1.1); names from Python's unicodedata",
            "font_sha256": glyphs.font_sha256,
        },
        "config": dataclasses.asdict(config),
        "parameters": parameters,
        "training": {name: _summary(progress) for name, progress in trained.progress.items()},
        "evaluation": {**dataclasses.asdict(measured), **dataclasses.asdict(evaluation)},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "weights": "float16; the text encoder and the classifier float32",
    }
    write_card(out, record)
    return evaluation


def save_model(directory: Path, trained: Trained) -> None:
    """Write the pipeline and the classifier into `directory`.

    Denoiser and autoencoder become float16, in place too; diffusers loads them in float32 unless asked otherwise. The
    text encoder stays float32, since transformers loads it in the dtype of the file.
    """
    pipe = build_pipeline(trained.model, trained.vae.half(), trained.tokenizer)
    pipe.transformer.half()
    # transformers 5 calls this class T5Tokenizer, the name of another one before; both know it by this name
    pipe.register_to_config(tokenizer=("transformers", "T5TokenizerFast"))
    pipe.save_pretrained(str(directory))
    save_classifier(trained.classifier, directory / "classifier")


def _summary(progress: Progress) -> dict[str, Any]:
    losses = [round(loss, 5) for loss in progress.losses]
    return {
        "steps": progress.steps,
        "first_loss": losses[0] if losses else None,  # of the first 100 steps
        "final_loss": losses[-1] if losses else None,
        "loss_per_1000_steps": losses[9::10],
        "seconds": round(progress.seconds),
        "resumed_at_steps": progress.resumed,
    }


def write_card(directory: Path, record: dict[str, Any]) -> None:
    """Write the model card and `PROVENANCE.json` beside the model; `record` is what `export` puts together."""
    config, measured = record["config"], record["evaluation"]
    write_atomically(directory / PROVENANCE, json.dumps(record, indent=2) + "\n")
    columns = [measured[name] for name in ("generated", "drawn", "decoded")]
    table = "\n".join(
        f"| {part} | " + " | ".join("{value:.1%} ({low:.1%} to {high:.1%})".format(**c[part]) for c in columns) + " |"
        for part in columns[0]
    )
    card = CARD.format(
        parameters=record["parameters"]["denoiser"] / 1e6,
        layers=config["layers"],
        width=config["heads"] * 32,
        size_mb=directory_bytes(directory) / 1e6,
        emoji=config["emoji"],
        side=SIDE,
        prompts=measured["prompts"],
        steps=measured["steps"],
        guidance=measured["guidance_scale"],
        table=table,
        frechet=measured["frechet"],
        frechet_drawn=measured["frechet_drawn"],
    )
    write_atomically(directory / "README.md", card)
