"""Chooses what a training generates: class labels, prompts, or encoded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harmonica_rt.cli.console import console
from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_training import Conditions, TrainConfig


class Subjects(NamedTuple):
    """The options that say what to generate; at most one is given.

    Attributes:
        labels: class labels with commas between them.
        prompts: a text file, one prompt per line.
        embeddings: a safetensors file of encoded prompts.
    """

    labels: str | None
    prompts: Path | None
    embeddings: Path | None


def chosen_conditions(pipeline: Any, config: TrainConfig, subjects: Subjects) -> Conditions | None:
    """The conditions that the options choose; None leaves the choice to the training.

    Raises:
        HarmonicaError: more than one option is given, or a label is malformed or unknown to the pipeline.
    """
    from harmonica_training import ClassLabels, Embeddings, class_labels, encode_prompts, read_prompts

    labels, prompts, embeddings = subjects
    given = [name for name, value in subjects._asdict().items() if value]
    if len(given) > 1:
        raise HarmonicaError(f"give one of --labels, --prompts and --embeddings, not {' and '.join(given)}")
    if labels is not None:
        try:
            chosen = ClassLabels([int(label) for label in labels.split(",")])
        except ValueError as error:
            raise HarmonicaError(f"--labels: expected whole numbers such as 0,1,2, got {labels!r}") from error
        known = class_labels(pipeline).labels
        if unknown := sorted(set(chosen.labels) - set(known)):
            raise HarmonicaError(f"--labels: the pipeline has no label {unknown[0]}; it has {known[0]} ... {known[-1]}")
        return chosen
    if embeddings is not None:
        return Embeddings.load(embeddings)
    if prompts is not None:
        with console.status("encode prompts"):
            guided = config.guidance is None or config.guidance > 1
            return encode_prompts(pipeline, read_prompts(prompts), guidance=guided, arguments=config.arguments)
    return None
