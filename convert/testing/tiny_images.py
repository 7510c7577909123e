"""Small images of noise with a colour for each class, for tests; they need Pillow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

_SIZE = (20, 24)


def save_images(folder: Path, classes: Sequence[str], each: int, *, seed: int = 0) -> Path:
    """Return `folder`, which now holds a folder of PNG files for each class.

    Args:
        folder: where to write.
        classes: what the folders are called.
        each: images of a class.
        seed: of the noise.
    """
    draw = random.Random(seed)
    for number, name in enumerate(classes):
        for index in range(each):
            save_image(folder / name / f"{index:03}.png", draw, base=80 * number % 200)
    return folder


def save_image(path: Path, draw: random.Random, *, base: int = 0) -> Path:
    """Return `path`, which now holds one image, its channels from `base` to `base` + 55."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    count = 3 * _SIZE[0] * _SIZE[1]
    pixels = bytes(base + draw.randrange(56) for _ in range(count))
    Image.frombytes("RGB", _SIZE, pixels).save(path)
    return path
