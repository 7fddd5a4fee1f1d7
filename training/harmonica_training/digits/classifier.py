"""A small convolutional classifier: the judge of the generated images and the source of features."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.untrusted.text import quoted
from harmonica_training.digits.config import NUM_CLASSES, DigitsConfig
from harmonica_training.digits.data import DigitsSplit, augment, batches
from harmonica_training.digits.files import read_json, read_state
from harmonica_training.digits.optim import learning_rate, set_learning_rate
from harmonica_training.errors import TrainingError

FORMAT_VERSION = 1
LARGEST = 1024  # channels or features


class DigitClassifier(nn.Module):
    """Digit images to class logits.

    Args:
        channels: channels of the first convolution; doubled by each of the two that follow.
        features: size of the penultimate layer.
    """

    def __init__(self, channels: int = 16, features: int = 64) -> None:
        super().__init__()
        self.config = {"version": FORMAT_VERSION, "channels": channels, "features": features}
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1)
        self.hidden = nn.Linear(4 * channels * 16, features)
        self.head = nn.Linear(features, NUM_CLASSES)

    def penultimate(self, images: Tensor) -> Tensor:
        """Features for a Frechet distance.

        Args:
            images: [B, 1, H, W] in [0, 1], H and W at least 16.

        Returns:
            [B, features].
        """
        x = F.adaptive_avg_pool2d(images, (16, 16))
        x = F.silu(self.conv1(x))
        x = F.silu(self.conv2(x))  # [B, 2C, 8, 8]
        x = F.silu(self.conv3(x))  # [B, 4C, 4, 4]
        return F.silu(self.hidden(F.dropout(x.flatten(1), 0.3, self.training)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, H, W] in [0, 1]."""
        logits: Tensor = self.head(self.penultimate(images))
        return logits


def save_classifier(model: DigitClassifier, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` (float32) into `directory`, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", json.dumps(model.config, indent=2) + "\n")
    write_atomically(directory / "model.safetensors", save(model.state_dict()))


def load_classifier(directory: Path | str) -> DigitClassifier:
    """The classifier saved in `directory`, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        TrainingError: a file of it is damaged, or its config has another version, missing or unknown fields, or sizes
            outside 1 ... 1024.
    """
    path = Path(directory) / "config.json"
    match read_json(path):
        case {"version": int(version), "channels": int(channels), "features": int(features), **rest} if (
            not rest and version == FORMAT_VERSION and 1 <= channels <= LARGEST and 1 <= features <= LARGEST
        ):
            model = DigitClassifier(channels, features)
        case config:
            raise TrainingError(
                f"{path}: expected a classifier config of version {FORMAT_VERSION} with channels and features, each "
                f"1 ... {LARGEST}, got {quoted(config)}; train it again with `python -m harmonica_training.digits`"
            )
    read_state(path.with_name("model.safetensors"), model)
    return model.eval()


@torch.no_grad()
def classify(model: DigitClassifier, images: Tensor, batch: int = 256) -> Tensor:
    """The most likely class, int64 [B], of images [B, 1, H, W] in [0, 1]."""
    return torch.cat([model(part).argmax(dim=1) for part in images.split(batch)])


@torch.no_grad()
def penultimate_features(model: DigitClassifier, images: Tensor, batch: int = 256) -> Tensor:
    """Penultimate features [B, features] of images [B, 1, H, W] in [0, 1]."""
    return torch.cat([model.penultimate(part) for part in images.split(batch)])


def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images [B, 1, H, W] whose most likely class is their label [B]; in [0, 1]."""
    return float((classify(model, images) == labels).double().mean())


def train_classifier(config: DigitsConfig, data: DigitsSplit) -> DigitClassifier:
    """Train on the augmented training images; return the model in evaluation mode."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    order = batches(len(data.train_labels), config.classifier_batch, generator)
    for step in tqdm(range(config.classifier_steps), desc="classifier", unit="step", mininterval=5.0):
        index = next(order)
        logits = model(augment(data.train_images[index], generator))
        loss = F.cross_entropy(logits, data.train_labels[index])
        set_learning_rate(optimizer, learning_rate(step, config.classifier_steps, config.classifier_lr))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
