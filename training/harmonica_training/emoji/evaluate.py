"""Measures a saved model: what its classifier sees in the pictures of 1,000 prompts, and in fresh ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica_training.digits.autoencoder import decode, encode
from harmonica_training.digits.evaluate import frechet_distance
from harmonica_training.digits.files import read_json
from harmonica_training.emoji.classifier import EmojiClassifier, load_classifier
from harmonica_training.emoji.config import EvaluationConfig
from harmonica_training.emoji.drawing import draw, fresh_pictures
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.judging import Judgement, judge
from harmonica_training.emoji.sampling import load_pipeline, sample
from harmonica_training.emoji.scenes import Scene, draw_scene
from harmonica_training.emoji.streams import Use, stream
from harmonica_training.errors import TrainingError

PROMPTS = "prompts.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of a saved model.

    Attributes:
        generated: of the pictures sampled from the prompts.
        drawn: of fresh pictures of the same scenes: what the classifier itself gets wrong.
        decoded: of those after the autoencoder: what the autoencoder loses.
        frechet: `frechet_distance` of the classifier's mean features, generated against fresh pictures.
        frechet_drawn: the same of fresh against other fresh pictures, the figure to compare with.
    """

    generated: Judgement
    drawn: Judgement
    decoded: Judgement
    frechet: float
    frechet_drawn: float

    def lines(self) -> list[str]:
        """One line per figure."""
        rows = []
        for field in dataclasses.fields(self)[:3]:
            judgement = getattr(self, field.name)
            for part in dataclasses.fields(judgement):
                rows.append(f"{field.name:10}{part.name:12}{getattr(judgement, part.name)}")
        rows.append(f"Frechet distance of features {self.frechet:.3f}; of fresh pictures {self.frechet_drawn:.3f}")
        return rows


def evaluation_scenes(glyphs: Glyphs, config: EvaluationConfig) -> list[Scene]:
    """The scenes to ask for, drawn from a stream that no training sees."""
    rng = stream(config.seed, Use.PROMPTS)
    return [draw_scene(glyphs.visible, rng) for _ in range(config.prompts)]


def prompts_text(scenes: list[Scene]) -> str:
    """Scenes as JSON, so that prompts can be judged where the font is not installed."""
    rows = [{"prompt": scene.prompt, **dataclasses.asdict(scene)} for scene in scenes]
    body = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"version": {FORMAT_VERSION}, "prompts": [\n{body}\n]}}\n'


def load_prompts(directory: Path | str) -> list[Scene]:
    """The scenes saved beside a model.

    Raises:
        FileNotFoundError: there are none.
        TrainingError: the file is damaged, of another version, or of other emoji.
    """
    path = Path(directory) / PROMPTS
    content = read_json(path)
    rows = content.get("prompts")
    if content.get("version") != FORMAT_VERSION or not isinstance(rows, list):
        raise TrainingError(f"{path}: expected version {FORMAT_VERSION} with prompts; export the model again")
    return [_scene(row, path) for row in rows]


def _scene(row: Any, path: Path) -> Scene:
    match row:
        case {"prompt": str(prompt), "arrangement": int(arrangement), "emoji": list(emoji), "background": int(colour)}:
            scene = Scene(arrangement, tuple(emoji), colour)
            if scene.is_valid() and scene.prompt == prompt:
                return scene
    raise TrainingError(f"{path}: a prompt does not fit its scene; export the model again")


def mean_features(classifier: EmojiClassifier, images: Tensor) -> Tensor:
    """Features [N, channels] of pictures [N, 3, 64, 64] in [0, 1]: the means over cells."""
    with torch.no_grad():
        return torch.cat([classifier.features(part).mean(dim=(2, 3)) for part in images.split(100)])


def evaluate(
    directory: Path, glyphs: Glyphs, config: EvaluationConfig, scenes: list[Scene]
) -> tuple[Evaluation, Tensor]:
    """Sample with the saved pipeline of `directory` and judge with its saved classifier.

    Returns:
        the figures, and the pictures [len(scenes), 3, 64, 64] in [0, 1].
    """
    pipe, classifier = load_pipeline(directory), load_classifier(directory / "classifier")
    images = sample(pipe, [scene.prompt for scene in scenes], config)
    drawn = draw(scenes, glyphs, stream(config.seed, Use.HELD_OUT)).images
    others = fresh_pictures(len(scenes), glyphs, stream(config.seed, Use.HELD_OUT, 1)).images
    features = [mean_features(classifier, pictures) for pictures in (images, drawn, others)]
    return (
        Evaluation(
            generated=judge(classifier, images, scenes),
            drawn=judge(classifier, drawn, scenes),
            decoded=judge(classifier, decode(pipe.vae, encode(pipe.vae, drawn)), scenes),
            frechet=frechet_distance(features[0], features[2]),
            frechet_drawn=frechet_distance(features[1], features[2]),
        ),
        images,
    )
