"""What the tests of the emoji model share: emoji that need no font."""

from __future__ import annotations

import numpy as np

from harmonica_training.emoji import Glyphs
from harmonica_training.emoji.names import COLOURS
from harmonica_training.emoji.scenes import SIZES


def colour_of(emoji: int) -> tuple[int, int, int]:
    """Red, green and blue of a square, 0 or 1."""
    return emoji % 2, (emoji // 2) % 2, (emoji // 4) % 2


def squares(count: int = 3) -> Glyphs:
    """Opaque squares, each of a colour of its own if there are 8 or fewer."""
    sprites = tuple(
        {size: np.full((size, size, 4), (*colour_of(emoji), 1.0), np.float32) for size in SIZES}
        for emoji in range(count)
    )
    return Glyphs(sprites, np.ones((count, len(COLOURS)), np.bool_), "0" * 64)
