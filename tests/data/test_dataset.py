"""Torch datasets that a Python program passes as images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import manyviews
from manyviews.config import load
from manyviews.data import of_dataset
from manyviews.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
TRAIN: dict[str, Any] = {"batch_size": 16, "epochs": 0.6, "precision": "fp32", "threads": 1, "log_every": 1}
TRAIN |= {"monitor": 0, "preview": 0}


class Clothes(Dataset[Any]):
    """Grey squares with a class, as PIL images, arrays or tensors."""

    classes = ("coat", "shoe")

    def __init__(self, kind: Any = Image.fromarray, pixels: Any = PIXELS, labelled: bool = True) -> None:
        self.kind, self.pixels, self.labelled = kind, pixels, labelled

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        image = self.kind(self.pixels[index])
        return (image, index % 2) if self.labelled else image


KINDS = [Image.fromarray, np.asarray, torch.from_numpy, lambda pixels: torch.from_numpy(pixels).unsqueeze(0)]


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_are_read_as_they_are(kind: Any) -> None:
    split = of_dataset(Clothes(kind), Clothes(kind, PIXELS[:8])).build()
    assert split.test is not None
    assert torch.equal(split.train.read(torch.arange(60))[:, 0], torch.from_numpy(PIXELS))
    assert (split.train.classes, len(split.test)) == (("coat", "shoe"), 8)
    assert split.train.labels is not None
    assert split.train.labels.tolist() == [0, 1] * 30


def test_without_labels_there_are_none_and_equal_images_have_equal_fingerprints() -> None:
    plain = of_dataset(Clothes(labelled=False)).build().train
    assert (plain.labels, plain.classes) == (None, ())
    assert of_dataset(Clothes()).build().train.fingerprint != plain.fingerprint
    assert TensorDataset(torch.from_numpy(PIXELS))[0][0].shape == (28, 28)


def test_images_of_several_sizes_are_resized_when_a_size_is_given() -> None:
    random = np.random.default_rng(1)
    shapes = [(40, 30, 3), (30, 40, 3), (64, 64, 3)]
    pixels = [random.integers(0, 256, shape, np.uint8) for shape in shapes]
    with pytest.raises(ValueError, match=r"image 0 of Clothes\S*/train has 30 × 40 pixels.*size=30"):
        of_dataset(Clothes(pixels=pixels)).build()
    images = of_dataset(Clothes(pixels=pixels), size=32).build().train
    assert images.read(torch.arange(3)).shape == (3, 3, 32, 32)


def test_what_is_not_an_image_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="ToTensor"):
        of_dataset(Clothes(lambda pixels: torch.from_numpy(pixels) / 255)).build()
    with pytest.raises(ValueError, match="str is not an image"):
        of_dataset(Clothes(lambda _: "a.png")).build()
    with pytest.raises(ValueError, match="Clothes is empty"):
        of_dataset(Clothes(pixels=PIXELS[:0]))
    with pytest.raises(ValueError, match=r"the images are the dataset Elsewhere: pass it there again"):
        load(Recipe, None, ["data.name=dataset", "data.key=Elsewhere"]).data.build()


def test_a_dataset_is_pretrained_on_resumed_and_evaluated(tmp_path: Path) -> None:
    dataset = Clothes()
    whole = manyviews.pretrain(data=dataset, output=tmp_path / "whole", train=TRAIN)

    def interrupt(_: Any) -> None:
        raise_interrupt()

    def raise_interrupt() -> None:
        import signal

        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        manyviews.pretrain(data=dataset, output=tmp_path / "cut", train=TRAIN, on_metrics=interrupt)
    cut = manyviews.pretrain(data=dataset, output=tmp_path / "cut", train=TRAIN, resume=True)
    weights = [run.backbone().state_dict() for run in (whole, cut)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    scores = whole.evaluate(
        tasks=["knn"], maps=[], baselines=False, data=of_dataset(dataset, Clothes(pixels=PIXELS[:20]))
    )
    assert scores
    other = Clothes(pixels=255 - PIXELS)
    with pytest.raises(ValueError, match="images are not those"):
        manyviews.pretrain(data=other, output=tmp_path / "cut", train={**TRAIN, "epochs": 1}, resume=True, extend=True)
