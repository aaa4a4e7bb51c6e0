"""Pictures for stages 5 and 7: JPEG files of the size of ImageNet's, made on the spot."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90
DISTINCT = 64


def write_pictures(folder: Path, count: int) -> Path:
    """Writes so many JPEG files, of which few differ, into a folder; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(picture, range(min(DISTINCT, count))))
    for number in range(count):
        file = folder / f"{number:06d}.jpg"
        if not file.exists():
            file.write_bytes(contents[number % len(contents)])
    return folder


def picture(number: int) -> bytes:
    """A JPEG file of soft shapes with fine grain: about 100 kB, as ImageNet's files are on average."""
    draw = np.random.default_rng(number)
    shapes = Image.fromarray(draw.integers(0, 256, (HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = draw.normal(0, 12, pixels.shape).astype(np.int16)
    content = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
