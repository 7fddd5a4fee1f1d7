"""The bundled emoji model: text to image with a PixArt-alpha pipeline, which this package draws data for and trains.

In: an installed font, Noto Color Emoji. Out: an autoencoder, a denoiser with its text encoder, and a classifier, saved
as a pipeline that `from_pretrained` loads, by `python -m harmonica_training.emoji`. Quality benchmarks use the prompts,
the classifier and its features.

Hazard: a run takes hours on a machine that others use, is stopped now and then, and must end as if it never had been.
So all random numbers depend on the step (`streams`), and a checkpoint holds everything else (`training`).

Reading order: `names`, `glyphs`, `scenes`, `drawing` (the data); `config`, `streams`, `training` (any network), then
`autoencoder`, `classifier`, `vocabulary` and `denoiser` (each network), `run` (the stages); `sampling`, `sheet`,
`judging`, `evaluate`, `export`.
"""

from harmonica_training.emoji.classifier import EmojiClassifier, load_classifier
from harmonica_training.emoji.config import EmojiConfig, EvaluationConfig, Stage
from harmonica_training.emoji.evaluate import Evaluation, evaluate, load_prompts, mean_features
from harmonica_training.emoji.export import export
from harmonica_training.emoji.glyphs import Glyphs, find_font, load_glyphs
from harmonica_training.emoji.judging import Judgement, Share, judge
from harmonica_training.emoji.run import train, trained_so_far
from harmonica_training.emoji.sampling import load_pipeline, sample
from harmonica_training.emoji.scenes import Scene

__all__ = [
    "EmojiClassifier",
    "EmojiConfig",
    "Evaluation",
    "EvaluationConfig",
    "Glyphs",
    "Judgement",
    "Scene",
    "Share",
    "Stage",
    "evaluate",
    "export",
    "find_font",
    "judge",
    "load_classifier",
    "load_glyphs",
    "load_pipeline",
    "load_prompts",
    "mean_features",
    "sample",
    "train",
    "trained_so_far",
]
