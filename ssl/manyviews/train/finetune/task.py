"""What there is to learn from, to choose by and to be measured on, and the classifier that begins."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.utils import distribute_bn
from torch import Tensor, nn

from manyviews.data import Images, Split, select
from manyviews.evaluators.fractions import draw
from manyviews.evaluators.splits import hold_out
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import EncodeSettings, extract, images_of
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.train.finetune.classifier import Probe, backbone_of, fit_probe, freeze, set_classes, set_head
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.views import MEAN, STD

MOST_PROBED = 10_000
"""Images that the head is fitted to before the first step; with more the probe would take longer than it saves."""


class Task(NamedTuple):
    """One backbone, its labelled images, and what is to be done with them."""

    settings: FinetuneSettings
    opened: PretrainedBackbone
    split: Split
    images: Images
    """The labelled images that are trained on, with ids of their own."""
    held_out: Int[Tensor, " held"]
    """Ids among the split's training images of those that choose the best checkpoint; perhaps none."""
    batch_size: int
    """Of all processes together."""

    @property
    def labels(self) -> Int[Tensor, " images"]:
        """The classes of the images that are trained on."""
        assert self.images.labels is not None
        return self.images.labels

    @property
    def held_out_labels(self) -> Int[Tensor, " held"]:
        """The classes of those that are held out."""
        assert self.split.train.labels is not None
        return self.split.train.labels[self.held_out]

    @property
    def probes(self) -> bool:
        """Whether there is a linear probe to begin from or to lose: not with random weights under a random head."""
        return self.settings.mode == "linear_then_full" or not self.settings.scratch

    @property
    def origin(self) -> dict[str, Any]:
        """What may not change when a run goes on, as JSON values."""
        origin = dict(self.opened.origin)
        return {"images": self.images.fingerprint, "weights": origin, "batch size": self.batch_size}


def task_of(settings: FinetuneSettings, opened: PretrainedBackbone, processes: int, console: Console) -> Task:
    """Chooses the labelled images, and which of them are held out.

    Raises:
        ValueError: without labels, with those of one class only, or with too few for a batch on every process.
    """
    split = images_of(opened, EncodeSettings(data=settings.data, workers=settings.workers), console)
    labels = split.train.labels
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError(
            "these images have no labels: put them into one folder for each class, or name a table with "
            "data.labels=labels.csv (a header, then name,label)"
        )
    chosen, _ = draw(labels, settings.fraction, seed=settings.seed, number=0)
    present = labels[chosen].unique()
    if len(present) < 2:
        only = split.train.classes[int(present[0])]
        raise ValueError(f"all {len(chosen):,} labelled images are of one class, {only}; a classifier needs two")
    kept, held_out = _hold_out(labels, chosen, settings)
    images = select(split.train, kept)
    # Even on each process, as timm's Mixup and batch norms ask.
    batch_size = min(settings.batch_size, len(kept)) // (2 * processes) * 2 * processes
    if not batch_size:
        raise ValueError(
            f"batches of {min(settings.batch_size, len(kept))} images do not give 2 to each of {processes} processes; "
            "use fewer processes, more labels, or a larger batch_size"
        )
    return Task(settings, opened, split, images, held_out, batch_size)


def fitted_probe(task: Task, device: torch.device, console: Console) -> Probe | None:
    """The linear probe on the features of the backbone as it was opened, by which fine-tuning is judged; collective.

    None where the task has none.
    """
    if not task.probes:
        return None
    model, probed = _backbone(task, device), _few(task.labels, task.settings.seed)
    with console.bar():
        report = partial(console.report, "encoding")
        features = outputs(model, task, task.images, probed, report)
        held_out = outputs(model, task, task.split.train, task.held_out, report) if len(task.held_out) else None
        return fit_probe(
            features,
            task.labels[probed],
            held_out,
            task.held_out_labels,
            len(task.images.classes),
            partial(console.report, "fitting the linear probe"),
        )


def probe_logits(
    probe: Probe, task: Task, device: torch.device, images: Images, ids: Int[Tensor, " chosen"]
) -> Float[Tensor, "chosen classes"]:
    """What the linear probe makes of images; collective."""
    return probe.logits(outputs(_backbone(task, device), task, images, ids))


def first_model(task: Task, device: torch.device, probe: Probe | None) -> nn.Module:
    """The classifier as it begins: learned or random weights, the head that the mode asks for, frozen what stays.

    Raises:
        ValueError: if the backbone cannot be given such a head, or has fewer blocks than are to move.
    """
    settings, model = task.settings, _backbone(task, device)
    set_classes(model, len(task.images.classes))
    model = model.to(device).to(memory_format=torch.channels_last)
    if settings.mode == "linear_then_full":
        assert probe is not None
        set_head(model, probe)
    if settings.mode == "last_blocks":
        freeze(model, settings.blocks)
    return model


def outputs(
    model: nn.Module,
    task: Task,
    images: Images,
    ids: Int[Tensor, " chosen"] | None = None,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Float[Tensor, "chosen width"]:
    """What a model in evaluation mode makes of images: features, or logits; the same on every process.

    `report` is called with the number of images that this process has read, and of all.
    """
    if distributed.world_size() > 1:
        # Each process has seen other images: their running statistics become one.
        distribute_bn(model, distributed.world_size(), reduce=True)
    device, workers = next(model.parameters()).device, task.settings.workers
    done, total = 0, len(images) if ids is None else len(ids)

    def prepare(pixels: Tensor) -> Tensor:
        nonlocal done
        done += len(pixels)
        report(min(done * distributed.world_size(), total), total)
        return task.opened.prepare(pixels)

    return extract(model, images, prepare=prepare, device=device, ids=ids, workers=workers)


def _backbone(task: Task, device: torch.device) -> nn.Module:
    settings = task.settings
    return backbone_of(task.opened, scratch=settings.scratch, seed=settings.seed, drop_path=settings.drop_path).to(
        device
    )


def model_input(
    opened: PretrainedBackbone, views: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch _ height width"]:
    """Views as the backbone is used to see them: in its channels, centred and scaled as its own input is."""
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(value, device=views.device).view(shape) for value in (opened.mean, opened.std))
    return views.expand(-1, opened.channels, -1, -1) * (STD / std) + (MEAN - mean) / std


def _few(labels: Tensor, seed: int) -> Tensor:
    """As many images as a head needs to begin with, of each class alike."""
    return draw(labels, min(1.0, MOST_PROBED / len(labels)), seed=seed, number=1)[0]


def _hold_out(labels: Tensor, chosen: Tensor, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    """The chosen images that are trained on, and those that are held out."""
    if settings.held_out == 0:
        return chosen, chosen[:0]
    among = torch.full_like(labels, -1)
    among[chosen] = labels[chosen]
    try:
        return hold_out(among, share=settings.held_out, seed=settings.seed)
    except ValueError:
        # So few of each class that the share is not one image of any.
        return chosen, chosen[:0]
