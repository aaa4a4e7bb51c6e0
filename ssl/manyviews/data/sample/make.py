"""Makes the sample: `python -m manyviews.data.sample.make FOLDER [OUTPUT]`.

FOLDER has the four files of Fashion-MNIST, such as Debian's /usr/share/datasets/fashion-mnist; OUTPUT is by default
this folder. Each split becomes one PNG, a mosaic of 100 images a row (a quarter smaller than a compressed array), and
one table of index in Fashion-MNIST and label.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from manyviews.data.sources.fashion_mnist import SIZE, read_split

SEED = 2018
PER_CLASS = {"train": 1000, "test": 200}
COLUMNS = 100


def make(source: Path, output: Path) -> None:
    """Chooses the images and writes the four files."""
    generator = np.random.default_rng(SEED)
    for split, count in PER_CLASS.items():
        images, labels = read_split(source, split)
        chosen = [generator.choice(np.flatnonzero(labels == label), count, replace=False) for label in range(10)]
        indices = np.sort(np.concatenate(chosen))
        tiles = images[indices].reshape(-1, COLUMNS, SIZE, SIZE).transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIZE)
        Image.fromarray(tiles).save(output / f"{split}.png", optimize=True)
        lines = [f"{index},{label}\n" for index, label in zip(indices, labels[indices], strict=True)]
        (output / f"{split}.csv").write_text("".join(["index,label\n", *lines]), newline="\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
