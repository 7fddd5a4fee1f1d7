"""Scenes as pictures, each drawn with shifts, sizes and a shade of its own."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training.emoji.glyphs import Array, Glyphs
from harmonica_training.emoji.names import BACKGROUNDS
from harmonica_training.emoji.scenes import ARRANGEMENTS, SIDE, Point, Scene, draw_scene

SHADE = 12.0  # a background's red, green and blue are each this far from its colour at most, of 255
_COLOURS = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Drawn scenes.

    Attributes:
        scenes: what was asked for.
        images: float32 [B, 3, 64, 64] in [0, 1].
        centres: where each emoji of each scene was drawn, pixels.
    """

    scenes: tuple[Scene, ...]
    images: Tensor
    centres: tuple[tuple[Point, ...], ...]


def draw(scenes: Sequence[Scene], glyphs: Glyphs, rng: np.random.Generator) -> Pictures:
    """Draw each scene once."""
    drawn = [_draw_one(scene, glyphs, rng) for scene in scenes]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return Pictures(tuple(scenes), images, tuple(centres for _, centres in drawn))


def fresh_pictures(count: int, glyphs: Glyphs, rng: np.random.Generator) -> Pictures:
    """`count` pictures of scenes drawn at random."""
    return draw([draw_scene(glyphs.visible, rng) for _ in range(count)], glyphs, rng)


def _draw_one(scene: Scene, glyphs: Glyphs, rng: np.random.Generator) -> tuple[Array, tuple[Point, ...]]:
    """float32 [64, 64, 3] in [0, 1], and the centre of each emoji."""
    arrangement = ARRANGEMENTS[scene.arrangement]
    shade = _COLOURS[scene.background] + rng.uniform(-SHADE, SHADE, 3).astype(np.float32)
    image: Array = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = (shade / 255.0).clip(0.0, 1.0)
    centres = []
    for index, anchor in zip(scene.emoji, arrangement.anchors, strict=True):
        size = int(rng.integers(arrangement.smallest, arrangement.largest + 1))
        corner = [_corner(c, size, arrangement.shift, rng) for c in anchor]
        _paste(image, glyphs.sprites[index][size], corner[0], corner[1])
        centres.append((corner[0] + size / 2.0, corner[1] + size / 2.0))
    return image, tuple(centres)


def _corner(anchor: float, size: int, shift: float, rng: np.random.Generator) -> int:
    """The first pixel along one axis of a sprite near `anchor`, so that all of it is inside."""
    return int(np.clip(round(anchor + rng.uniform(-shift, shift) - size / 2.0), 0, SIDE - size))


def _paste(image: NDArray[np.float32], sprite: Array, x: int, y: int) -> None:
    """Blend a sprite into the image, in place."""
    size = len(sprite)
    target = image[y : y + size, x : x + size]
    target *= 1.0 - sprite[..., 3:]
    target += sprite[..., :3]
