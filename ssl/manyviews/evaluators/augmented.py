"""The linear probe as papers train it: on new crops and flips in every epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from manyviews.config import Settings
from manyviews.data import Images, Report
from manyviews.data.images import Crops, Interpolation, Pictures
from manyviews.data.sampler import order
from manyviews.evaluators.splits import Prediction, hold_out
from manyviews.features.encoding import encoded, extract
from manyviews.optim import cosine
from manyviews.system import distributed
from manyviews.views import MEAN, STD, StandardView, Views, ViewsSettings

MOMENTUM = 0.9


class AugmentedSettings(Settings):
    """The grid of heads that are trained at once, and their augmentation."""

    epochs: int = Field(90, ge=1, le=100_000)
    """Passes over the training images; the backbone encodes them again in each."""
    batch_size: int = Field(256, ge=1, le=1_048_576)
    """Images of one step of stochastic gradient descent, over all ranks."""
    rates: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=1, max_length=64
    )
    """Learning rates for a batch of 256 images, scaled with the batch; they fall to zero along a cosine."""
    decays: tuple[Annotated[float, Field(ge=0, le=1e4)], ...] = Field((0.0, 1e-6, 1e-4), min_length=1, max_length=64)
    """Weight decays."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop shows."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _crops_show_a_share(self) -> "AugmentedSettings":
        if not 1e-4 <= self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {list(self.crop_scale)}; it must be [smallest, largest] in [0.0001, 1]")
        return self


@dataclass
class RandomCrops:
    """Crops of the images of an epoch, as 8-bit pixels, normalised as a view is; a `View`."""

    view: StandardView
    views: Views
    epoch: int
    ids: Iterator[Int64[Tensor, " batch"]]
    """Of the batches to come, on their device."""

    @property
    def interpolation(self) -> Interpolation:
        """How crops are resized."""
        return self.views.interpolation

    def crops(
        self, ids: Int64[Tensor, " batch"], epoch: int, aspects: Float[Tensor, " batch"] | None
    ) -> tuple[Crops, ...]:
        """The boxes of the random crops, a function of id and epoch."""
        return self.views.crops(ids, self.epoch, aspects)

    def __call__(self, pictures: Pictures) -> Float[Tensor, "batch channels size size"]:
        """The input of a backbone."""
        return self.view(Pictures((self.pixels(pictures, next(self.ids))[None],), cropped=True))

    def pixels(self, pictures: Pictures, ids: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch channels size size"]:
        """The crops as pixels from 0 to 255."""
        (views,) = self.views(pictures, ids, self.epoch)
        pixels: UInt8[Tensor, "batch channels size size"]
        pixels = views[0].mul(255 * STD).add(255 * MEAN).round().byte()
        return pixels


def augmented_probe(
    backbone: nn.Module,
    images: Images,
    test: Images,
    view: StandardView,
    settings: AugmentedSettings,
    classes: int,
    *,
    share: float = 0.2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    report: Report | None = None,
) -> Prediction:
    """Predicts the test images by a linear head trained on crops and flips of training images.

    Stochastic gradient descent with momentum 0.9 and a cosine schedule; the heads of all pairs of learning rate and
    weight decay are one matrix product (as in DINOv2, `dinov2/eval/linear.py`). Each pair has two heads: one does not
    train on the held-out images (`share` of each class), and its accuracy on them, as whole images, chooses the pair;
    the other trains on all and predicts the test images. The backbone thus encodes each image once per epoch. Equal
    accuracies go to the pair that the grid names first.

    The backbone stays unchanged, in evaluation mode meanwhile. Draws are a pure function of seed, epoch and image.
    Collective: each rank encodes its part of every batch.

    `backbone` maps [batch, channels, height, width] to [batch, width] and is on `device`; `view` makes its input of
    test images, and normalises crops. Training images labelled −1 are left out. `workers` threads read images ahead.

    Raises:
        ValueError: if no training image has a label, or no class has two images.
    """
    if images.labels is None:
        raise ValueError("a linear head is trained on labelled images, and there are no labels")
    labels = images.labels
    _, held = hold_out(labels, share=share, seed=seed, one_each=True)
    if not len(held):
        raise ValueError("the probe on crops chooses its rate on held-out images, and no class has two to hold one out")
    labelled = (labels >= 0).nonzero().squeeze(1)
    counts = torch.ones(2, len(labels), dtype=torch.bool)
    counts[0, held] = False
    classes_of, counts = labels.to(device), counts.to(device)
    crop = ViewsSettings(
        num_views=1, crop_scale=settings.crop_scale, flip=settings.flip, brightness=0.0, contrast=0.0, saturation=0.0,
        hue=0.0, gamma=0.0, greyscale=0.0, blur=0.0,
    )  # fmt: skip
    views = crop.build(size=view.size, channels=images.channels, seed=seed).to(device)
    grid = list(product(settings.rates, settings.decays))
    heads: Heads | None = None
    total, step = settings.epochs * -(-len(labelled) // settings.batch_size), 0
    read = partial(encoded, device=device, workers=workers, keep=True)
    encode = partial(extract, view=view, device=device, workers=workers, batch_size=settings.batch_size, keep=True)
    for epoch in range(settings.epochs):
        shuffled = labelled[order(len(labelled), seed, epoch)]
        batches, on_device = (torch.split(ids, settings.batch_size) for ids in (shuffled, shuffled.to(device)))
        cropped = RandomCrops(view, views, epoch, map(_own_part, on_device))
        rows = read(backbone, images, [*map(_own_part, batches)], view=cropped)
        for batch, (_, own) in zip(on_device, rows, strict=True):
            lengths = [len(part) for part in batch.tensor_split(distributed.world_size())]
            features = distributed.gather_without_gradient(own[: lengths[distributed.rank()]], lengths)
            heads = heads or Heads(grid, classes, features)
            rate = settings.batch_size / 256 * cosine(step / total)
            heads.step(features, classes_of[batch], counts[:, batch], rate)
            step += 1
            if report is not None:
                report("training linear heads on crops", step, total)
    assert heads is not None, "there are labelled images"
    held_features = encode(backbone, images, ids=held).to(device)
    hits = (heads.predict(held_features, 0).cpu() == labels[held]).sum(1)
    best = int(hits.argmax())
    predictions = heads.predict(encode(backbone, test).to(device), 1, best)[0].cpu()
    chosen = dict(zip(("rate", "decay"), grid[best], strict=True))
    return Prediction(predictions, chosen, hits[best].item() / len(held))


def _own_part(batch: Tensor) -> Tensor:
    """The ids of a batch that this rank encodes; if there are none, one whose features are dropped."""
    part = batch.tensor_split(distributed.world_size())[distributed.rank()]
    # The gather is collective.
    return part if len(part) else batch[:1]


class Heads:
    """Linear classifiers, from zero: one for each part of the images and (rate, decay) pair.

    `like` is a batch of features of the width, precision and device to come.
    """

    def __init__(self, grid: Sequence[tuple[float, float]], classes: int, like: Float[Tensor, "batch width"]) -> None:
        self.rates, self.decays = (like.new_tensor(column)[:, None, None] for column in zip(*grid, strict=True))
        # The last column is the bias.
        self.weights = like.new_zeros(2, len(grid), classes, like.shape[1] + 1)
        self.momentum = torch.zeros_like(self.weights)

    @torch.no_grad()
    def step(
        self,
        features: Float[Tensor, "batch width"],
        labels: Int[Tensor, " batch"],
        counts: Bool[Tensor, "2 batch"],
        rate: float,
    ) -> None:
        """Takes a step on the mean cross-entropy of each part; `rate` scales every rate."""
        inputs = F.pad(features, (0, 1), value=1.0)
        classes = self.weights.shape[2]
        logits = (inputs @ self.weights.flatten(0, 2).T).unflatten(1, (2, -1, classes))
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        residual = torch.softmax(logits, 3).sub_(F.one_hot(labels, classes)[:, None, None])
        residual *= share.T[:, :, None, None]
        gradient = (residual.flatten(1).T @ inputs).view_as(self.weights)
        self.momentum.mul_(MOMENTUM).add_(gradient).add_(self.decays * self.weights)
        self.weights -= rate * self.rates * self.momentum

    @torch.no_grad()
    def predict(
        self, features: Float[Tensor, "images width"], part: int, head: int | None = None
    ) -> Int[Tensor, "heads images"]:
        """Predicts classes by each head of a part, or by one; −1 from a diverged head."""
        chosen = self.weights[part] if head is None else self.weights[part, head][None]
        predictions = torch.stack([(features @ one[:, :-1].T + one[:, -1]).argmax(1) for one in chosen])
        return predictions.masked_fill(~chosen.isfinite().all((1, 2))[:, None], -1)
