"""Draws each emoji once with Noto Color Emoji and keeps it at every size that a scene may ask for.

The font (Debian: `fonts-noto-color-emoji`; SIL Open Font License 1.1) holds bitmaps of one size, 109 pixels per em, and
smaller ones are made from those. The licence does not extend to pictures drawn with a font.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from harmonica_training.emoji.names import BACKGROUNDS, CHARACTERS
from harmonica_training.errors import TrainingError

FONT_PIXELS = 109  # the only size of the font's bitmaps
CANVAS = (136, 128)  # width and height of a glyph, pixels
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
FILE = "NotoColorEmoji.ttf"
DIFFERENT = 70.0  # distance of two colours in RGB, 0 ... 255, from which a pixel stands out
VISIBLE = 0.4  # share of an emoji's pixels that must stand out from the background

Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Emoji as arrays.

    Attributes:
        sprites: for emoji `i` at `size` pixels, `sprites[i][size]` is float32 [size, size, 4]: red, green, blue, each
            multiplied by alpha, and alpha, all in [0, 1].
        visible: bool [emoji, background], whether the emoji stands out from the background.
        font_sha256: digest of the font's file.
    """

    sprites: tuple[dict[int, Array], ...]
    visible: NDArray[np.bool_]
    font_sha256: str


def find_font(path: Path | None = None) -> Path:
    """The font's file: `path` if given, else the one installed in a usual folder.

    Raises:
        TrainingError: there is none.
    """
    if path is not None:
        if not path.is_file():
            raise TrainingError(f"there is no font {path}")
        return path
    for folder in FOLDERS:
        for found in sorted(Path(folder).expanduser().rglob(FILE)):
            return found
    raise TrainingError(
        f"{FILE} is not in {', '.join(FOLDERS)}; install it (Debian: apt-get install fonts-noto-color-emoji) or pass "
        "its path with --font"
    )


def load_glyphs(font: Path, count: int, sizes: range) -> Glyphs:
    """The first `count` emoji at all `sizes`, pixels.

    Raises:
        TrainingError: the font or Pillow cannot draw them.
    """
    if not features.check("freetype2"):
        raise TrainingError("this Pillow is built without FreeType, which draws the emoji")
    try:
        face = ImageFont.truetype(str(font), FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise TrainingError(f"{font}: not a font with bitmaps of {FONT_PIXELS} pixels: {error}") from error
    drawn = [_draw(character, face) for character in CHARACTERS[:count]]
    visible = np.array([[_stands_out(image, colour) for colour in BACKGROUNDS.values()] for image in drawn])
    sprites = tuple({size: _resized(image, size) for size in sizes} for image in drawn)
    return Glyphs(sprites, visible, hashlib.sha256(font.read_bytes()).hexdigest())


def _draw(character: str, face: ImageFont.FreeTypeFont) -> Image.Image:
    """An emoji with its margins cut, in the middle of a transparent square."""
    canvas = Image.new("RGBA", CANVAS)
    ImageDraw.Draw(canvas).text((0, 0), character, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise TrainingError(f"the font draws nothing for U+{ord(character):04X}")
    cut = canvas.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


def _resized(image: Image.Image, size: int) -> Array:
    """float32 [size, size, 4] with colours multiplied by alpha, so that transparent pixels add no colour."""
    pixels = np.asarray(image, np.float32) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[..., i])).resize((size, size), Image.Resampling.BOX)
        for i in range(4)
    ]
    return np.stack([np.asarray(channel, np.float32) for channel in channels], axis=-1)


def _stands_out(image: Image.Image, colour: tuple[int, int, int]) -> bool:
    pixels = np.asarray(image, np.float32)
    opaque = pixels[pixels[..., 3] > 128.0][:, :3]
    distance = np.linalg.norm(opaque - np.array(colour, np.float32), axis=-1)
    return bool((distance > DIFFERENT).mean() >= VISIBLE)
