"""Writes a trained model as a diffusers directory, with its model card and its provenance."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

from harmonica_rt.schedule.files import write_atomically
from harmonica_training.digits.classifier import DigitClassifier, save_classifier
from harmonica_training.digits.config import NUM_CLASSES, DigitsConfig, EvaluationConfig
from harmonica_training.digits.data import HELD_OUT
from harmonica_training.digits.denoiser import build_scheduler
from harmonica_training.digits.evaluate import Evaluation

FORMAT_VERSION = 1
PROVENANCE = "PROVENANCE.json"
PACKAGES = ("torch", "diffusers", "scikit-learn", "safetensors")

CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
---

# digits-dit

A latent, class-conditional Diffusion Transformer that draws handwritten digits, small enough to ship with
harmonica-rt and to run on a CPU: {parameters:.1f} M parameters, {layers} blocks of width {width}, {tokens}
tokens, {size_mb:.1f} MB in bfloat16. It is a plain diffusers pipeline:

```python
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("harmonica_rt/demo/digits-dit")
image = pipe(pipe.get_label_ids(["7"]), num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

Images are greyscale, {image_size}x{image_size} pixels. Classes are 0 to 9; class 1000 is "no class".

## Measured

On this saved model, loaded in float32 on a CPU, {images} images, {steps} DDIM steps, guidance {guidance}:

| figure | value |
| --- | --- |
| generated images recognised as the digit asked for | {generated:.1%} |
| the same classifier on held-out real digits | {classifier:.1%} |
| spread of the images of a class, relative to the training images | {diversity:.2f} |
| distance to the nearest training image, relative to held-out real images | {novelty:.2f} |
| Frechet distance of classifier features to real images | {frechet:.3f} |
| the same, held-out against training images | {frechet_real:.3f} |

The classifier is in `classifier/` (`harmonica_training.digits.load_classifier`); it never saw a generated
image in training. How the model was made, to the seed and the losses, is in `PROVENANCE.json`.

## Data

Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (Alpaydin and Kaynak, 1998,
doi:10.24432/C50P49, CC BY 4.0), the 1,797 images of 8x8 pixels that scikit-learn carries as `load_digits`:
{train} train, {held_out} are held out. They are given a margin, interpolated to {image_size}x{image_size} and
passed through a soft threshold.

## Limits

It draws digits, for tests, demonstrations and benchmarks of feature caching, and nothing else.
"""


def save_model(
    directory: Path, transformer: DiTTransformer2DModel, vae: AutoencoderKL, classifier: DigitClassifier
) -> None:
    """Write the pipeline (bfloat16 safetensors) and the classifier (float32) into `directory`.

    The networks given become bfloat16; load the directory to get them back in float32.
    """
    labels = {index: str(index) for index in range(NUM_CLASSES)}
    pipe = DiTPipeline(
        transformer=transformer.bfloat16(),
        vae=vae.bfloat16(),
        scheduler=build_scheduler(),
        id2label=labels,
    )
    pipe.register_to_config(id2label=labels)  # `DiTPipeline` reads it from the index but does not write it
    vae.register_to_config(_name_or_path="")  # the local path that it was loaded from
    pipe.save_pretrained(str(directory))
    save_classifier(classifier, directory / "classifier")


def directory_bytes(directory: Path) -> int:
    """Size of all files below `directory`, bytes."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def provenance(
    command: str,
    config: DigitsConfig,
    evaluation_config: EvaluationConfig,
    evaluation: Evaluation,
    training: dict[str, Any],
) -> dict[str, Any]:
    """What made the model and what was measured on it, ready for JSON; no paths of the machine, no host."""
    return {
        "version": FORMAT_VERSION,
        "script": "training/harmonica_training/digits",
        "command": command,
        "data": {
            "source": "sklearn.datasets.load_digits: UCI Optical Recognition of Handwritten Digits, "
            "doi:10.24432/C50P49, CC BY 4.0",
            "train_images": 1797 - HELD_OUT,
            "held_out_images": HELD_OUT,
        },
        "config": dataclasses.asdict(config),
        "training": training,
        "evaluation": {**dataclasses.asdict(evaluation_config), **dataclasses.asdict(evaluation)},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "weights": "bfloat16; the classifier float32",
    }


def write_card(directory: Path, record: dict[str, Any], parameters: int) -> None:
    """Write the model card and `PROVENANCE.json` beside the model.

    Args:
        directory: of the saved model.
        record: from `provenance`.
        parameters: number of the denoiser's parameters.
    """
    config, measured = record["config"], record["evaluation"]
    write_atomically(directory / PROVENANCE, json.dumps(record, indent=2) + "\n")
    card = CARD.format(
        parameters=parameters / 1e6,
        layers=config["layers"],
        width=config["heads"] * config["head_dim"],
        tokens=(config["image_size"] // 8) ** 2,
        size_mb=directory_bytes(directory) / 1e6,
        image_size=config["image_size"],
        images=measured["images"],
        steps=measured["steps"],
        guidance=measured["guidance_scale"],
        generated=measured["generated_accuracy"],
        classifier=measured["classifier_accuracy"],
        diversity=measured["diversity"],
        novelty=measured["novelty"],
        frechet=measured["frechet"],
        frechet_real=measured["frechet_real"],
        train=record["data"]["train_images"],
        held_out=record["data"]["held_out_images"],
    )
    write_atomically(directory / "README.md", card)
