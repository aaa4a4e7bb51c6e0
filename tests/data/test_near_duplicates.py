"""Images that cannot be told from each other are told of before the first step."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manyviews.data import Folder, Sample
from manyviews.data.listing.inventory import copy_warnings


def write(folder: Path, pictures: list[np.ndarray], ending: str = "png") -> None:
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.{ending}")


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_images_of_one_colour_are_said_to_be_alike_in_memory_and_on_disk(tmp_path: Path, memory: float) -> None:
    write(tmp_path, [np.full((16 + number, 16 + number, 3), 7, np.uint8) for number in range(70)])
    (said,) = copy_warnings(Folder(path=str(tmp_path), size=16, memory=memory).build())
    assert "all look the same" in said


def test_copies_are_counted_from_a_tenth_on(tmp_path: Path) -> None:
    write(tmp_path, [noise(0), noise(0), noise(0), *map(noise, range(1, 18))])
    (said,) = copy_warnings(Folder(path=str(tmp_path), size=16).build())
    assert said.startswith("2 of 20 training images are copies of others")
    (tmp_path / "0.png").unlink()
    assert not list(copy_warnings(Folder(path=str(tmp_path), size=16).build()))


def test_nothing_is_said_of_images_that_differ() -> None:
    assert not list(copy_warnings(Sample().build()))
