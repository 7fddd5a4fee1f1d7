"""A convolutional network that finds emoji in a picture and names its background: the judge, and a source of features.

It is trained on fresh pictures alone; it never sees a generated one.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.untrusted.text import quoted
from harmonica_training.digits.files import read_json, read_state
from harmonica_training.emoji.config import EmojiConfig
from harmonica_training.emoji.drawing import Pictures, fresh_pictures
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.names import COLOURS, EMOJI
from harmonica_training.emoji.scenes import SIDE
from harmonica_training.emoji.streams import Use, noise, stream
from harmonica_training.emoji.training import PARTS, LossParts
from harmonica_training.errors import TrainingError

FORMAT_VERSION = 1
LARGEST = 1024  # channels
GRID = 16  # cells along each side
CELL = SIDE // GRID  # pixels
RADIUS = 7.0  # a cell whose centre is this near to the centre of an emoji is labelled with it, pixels
ABRASION = 0.1  # deviation of the noise added to a picture in training, intensity in [0, 1]
_EMPTY_WEIGHT = 0.3  # of cells without an emoji, which are most


class EmojiClassifier(nn.Module):
    """Pictures [B, 3, 64, 64] in [0, 1] to logits of cells and of the background.

    Args:
        channels: channels of the hidden layers, a multiple of 8.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.config = {"version": FORMAT_VERSION, "channels": channels}
        self.first = nn.Conv2d(3, channels // 2, 5, stride=2, padding=2)
        self.second = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.deeper = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation) for dilation in (1, 2, 3, 1)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in self.deeper)
        self.cells = nn.Conv2d(channels, len(EMOJI) + 1, 1)
        self.background = nn.Linear(channels, len(COLOURS))

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer [B, channels, 16, 16]; its mean over cells serves a Frechet distance."""
        x = F.silu(self.first(images * 2.0 - 1.0))
        x = F.silu(self.second(x))
        for convolution, norm in zip(self.deeper, self.norms, strict=True):
            x = x + F.silu(norm(convolution(x)))
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of cells [B, emoji + 1, 16, 16], the last for no emoji, and of backgrounds [B, colours]."""
        hidden = self.features(images)
        return self.cells(hidden), self.background(hidden.mean(dim=(2, 3)))


def cell_labels(pictures: Pictures) -> Tensor:
    """The emoji nearest to each cell, if it is near enough, else the number of emoji: int64 [B, 16, 16]."""
    middle = (torch.arange(GRID) + 0.5) * CELL
    labels = torch.full((len(pictures.scenes), GRID, GRID), len(EMOJI))
    for label, scene, centres in zip(labels, pictures.scenes, pictures.centres, strict=True):
        nearest = torch.full((GRID, GRID), RADIUS)
        for emoji, (x, y) in zip(scene.emoji, centres, strict=True):
            distance = torch.hypot(middle[:, None] - y, middle[None, :] - x)
            label[distance < nearest] = emoji
            nearest = torch.minimum(nearest, distance)
    return labels


def classifier_losses(model: EmojiClassifier, config: EmojiConfig, glyphs: Glyphs) -> LossParts:
    """Cross-entropy of cells and backgrounds, on pictures drawn for the step, with some noise on them."""
    weights = torch.ones(len(EMOJI) + 1)
    weights[-1] = _EMPTY_WEIGHT

    def parts_of(step: int) -> Sequence[Callable[[], Tensor]]:
        rng = stream(config.seed, Use.CLASSIFIER, step)
        pictures = fresh_pictures(config.classifier.batch, glyphs, rng)
        strength = ABRASION * torch.from_numpy(rng.random((len(pictures.scenes), 1, 1, 1), "float32"))
        images = pictures.images + strength * noise(tuple(pictures.images.shape), rng)
        backgrounds = torch.tensor([scene.background for scene in pictures.scenes])

        def loss(part: Tensor, cells: Tensor, background: Tensor) -> Tensor:
            found, colours = model(part)
            of_cells = F.cross_entropy(found, cells, weight=weights)
            total: Tensor = of_cells + F.cross_entropy(colours, background)
            return total * (len(part) / len(images))

        columns = (column.chunk(PARTS) for column in (images, cell_labels(pictures), backgrounds))
        return [functools.partial(loss, *row) for row in zip(*columns, strict=True)]

    return parts_of


def save_classifier(model: EmojiClassifier, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` (float32) into `directory`, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", json.dumps(model.config, indent=2) + "\n")
    write_atomically(directory / "model.safetensors", save(model.state_dict()))


def load_classifier(directory: Path | str) -> EmojiClassifier:
    """The classifier saved in `directory`, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        TrainingError: a file of it is damaged, or its config has another version or fields.
    """
    path = Path(directory) / "config.json"
    match read_json(path):
        case {"version": int(version), "channels": int(channels), **rest} if (
            not rest and version == FORMAT_VERSION and 8 <= channels <= LARGEST and channels % 8 == 0
        ):
            model = EmojiClassifier(channels)
        case config:
            raise TrainingError(
                f"{path}: expected version {FORMAT_VERSION} and channels, a multiple of 8 up to {LARGEST}, got "
                f"{quoted(config)}; train it again with `python -m harmonica_training.emoji train`"
            )
    read_state(path.with_name("model.safetensors"), model)
    return model.eval()
