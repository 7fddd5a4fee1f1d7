"""Whether pictures show what their scenes ask for, as the classifier sees them, with intervals."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harmonica_training.emoji.classifier import CELL, EmojiClassifier
from harmonica_training.emoji.names import EMOJI
from harmonica_training.emoji.scenes import ARRANGEMENTS, Point, Scene

FEWEST_CELLS = 4  # of a found emoji; about ten are labelled with one
NEAR = 9.0  # an emoji is in its place if its centre is this near to its anchor, pixels; anchors are 18 or more apart
_QUANTILE = 1.959964  # of the normal distribution, for 95 %


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of prompts, with its Wilson interval of 95 % (Wilson, 1927, JASA 22:209)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Which parts are as asked for, over prompts.

    Attributes:
        objects: exactly the emoji asked for are found.
        positions: every emoji asked for is found in its place.
        background: the background has the colour asked for.
        good: all three.
    """

    objects: Share
    positions: Share
    background: Share
    good: Share


def share(hits: Sequence[bool]) -> Share:
    """The share of True, which is an unbiased estimate if the prompts are drawn independently.

    Raises:
        ValueError: there are none.
    """
    count = len(hits)
    if count == 0:
        raise ValueError("a share of no prompts is not defined")
    value, spread = sum(hits) / count, _QUANTILE**2 / count
    middle = (value + spread / 2.0) / (1.0 + spread)
    half = _QUANTILE / (1.0 + spread) * math.sqrt(value * (1.0 - value) / count + spread / (4.0 * count))
    return Share(value, max(0.0, middle - half), min(1.0, middle + half))


@torch.no_grad()
def judge(classifier: EmojiClassifier, images: Tensor, scenes: Sequence[Scene]) -> Judgement:
    """Compare pictures [N, 3, 64, 64] in [0, 1] with the N scenes that they should show."""
    columns: dict[str, list[bool]] = {field.name: [] for field in dataclasses.fields(Judgement)}
    parts = [classifier(part) for part in images.split(100)]
    labels = torch.cat([cells.argmax(dim=1) for cells, _ in parts])
    backgrounds = torch.cat([background.argmax(dim=1) for _, background in parts])
    for label, background, scene in zip(labels, backgrounds.tolist(), scenes, strict=True):
        found = find(label)
        anchors = dict(zip(scene.emoji, ARRANGEMENTS[scene.arrangement].anchors, strict=True))
        objects = found.keys() == anchors.keys()
        positions = all(e in found and math.dist(found[e], anchor) <= NEAR for e, anchor in anchors.items())
        row = (objects, positions, background == scene.background)
        for name, hit in zip(columns, (*row, all(row)), strict=True):
            columns[name].append(hit)
    return Judgement(**{name: share(hits) for name, hits in columns.items()})


def find(labels: Tensor) -> dict[int, Point]:
    """The emoji in cells labelled int64 [16, 16], each with the mean place of its cells, pixels."""
    found = {}
    for emoji in labels.unique().tolist():
        places = (labels == emoji).nonzero()
        if emoji < len(EMOJI) and len(places) >= FEWEST_CELLS:
            y, x = ((places.float().mean(dim=0) + 0.5) * CELL).tolist()
            found[emoji] = (x, y)
    return found
