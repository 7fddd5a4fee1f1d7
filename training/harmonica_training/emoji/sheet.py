"""Sheets of pictures as PNG files."""

import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from harmonica_rt.schedule.files import write_atomically


def save_sheet(images: Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Write images [N, 3, H, W] in [0, 1] as one PNG, row by row; an incomplete last row is left out.

    Raises:
        ValueError: there is no complete row.
    """
    rows, (height, width) = len(images) // columns, images.shape[-2:]
    if rows == 0:
        raise ValueError(f"a sheet of {columns} columns needs at least {columns} images, got {len(images)}")
    tiles = images[: rows * columns].reshape(rows, columns, 3, height, width)
    pixels = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    sheet = Image.fromarray((pixels * 255.0).round().byte().numpy())
    buffer = io.BytesIO()
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
