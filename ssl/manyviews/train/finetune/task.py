"""The backbone, images and initial classifier of a fine-tuning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.utils import distribute_bn
from torch import Tensor, nn

from manyviews.data import Images, Split, select
from manyviews.encoder.backbone import create_backbone
from manyviews.evaluators.fractions import draw
from manyviews.evaluators.splits import hold_out
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import EncodeSettings, extract, images_of
from manyviews.system import distributed
from manyviews.system.console import Console
from manyviews.train.finetune.classifier import Probe, fit_probe, freeze, set_classes, set_head
from manyviews.train.finetune.settings import FinetuneSettings
from manyviews.views import ViewsSettings, renormalised

MOST_PROBED = 10_000
"""Images that the linear probe is fitted to; more would take longer than they save."""


class Task(NamedTuple):
    """Settings, backbone and labelled images of a fine-tuning."""

    settings: FinetuneSettings
    opened: PretrainedBackbone
    split: Split
    images: Images
    """The labelled training images, with ids of their own."""
    held_out: Int[Tensor, " held"]
    """Ids in `split.train` of the images that choose the best checkpoint; may be empty."""
    batch_size: int
    """Over all ranks."""

    @property
    def labels(self) -> Int[Tensor, " images"]:
        """The classes of `images`."""
        assert self.images.labels is not None
        return self.images.labels

    @property
    def held_out_labels(self) -> Int[Tensor, " held"]:
        """The classes of `held_out`."""
        assert self.split.train.labels is not None
        return self.split.train.labels[self.held_out]

    @property
    def probes(self) -> bool:
        """Whether a linear probe is fitted: not for random weights under a random head."""
        return self.settings.mode == "linear_then_full" or not self.settings.scratch

    @property
    def origin(self) -> dict[str, Any]:
        """What must not change when a run is resumed, as JSON values."""
        weights = dict(self.opened.origin)
        return {"images": self.images.fingerprint, "weights": weights, "batch size": self.batch_size}


def task_of(settings: FinetuneSettings, opened: PretrainedBackbone, processes: int, console: Console) -> Task:
    """Selects the labelled images, and those to hold out.

    Raises:
        ValueError: without labels, with one class only, or with too few images for a batch on every rank.
    """
    opened = _with_view(opened, settings.views)
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
    # Even on each rank, as timm's Mixup and batch norms require.
    batch_size = min(settings.batch_size, len(kept)) // (2 * processes) * 2 * processes
    if not batch_size:
        raise ValueError(
            f"batches of {min(settings.batch_size, len(kept))} images do not give 2 to each of {processes} processes; "
            "use fewer processes, more labels, or a larger batch_size"
        )
    return Task(settings, opened, split, images, held_out, batch_size)


def fitted_probe(task: Task, device: torch.device, console: Console) -> Probe | None:
    """Fits the linear probe to the features before fine-tuning, if the task has one; collective."""
    if not task.probes:
        return None
    model = backbone_of(task, device)
    probed, _ = draw(task.labels, min(1.0, MOST_PROBED / len(task.labels)), seed=task.settings.seed, number=1)
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


def first_model(task: Task, device: torch.device, probe: Probe | None) -> nn.Module:
    """Builds the initial classifier of a mode: weights, head and frozen layers.

    Raises:
        ValueError: if the backbone cannot have such a head, or has fewer blocks than are to be trained.
    """
    settings, model = task.settings, backbone_of(task, device)
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
    """Features or logits of a model in evaluation mode, on every rank; collective.

    `report` is called with the number of images that are done, and of all.
    """
    if distributed.world_size() > 1:
        # The running statistics differ between ranks; those of rank 0 are saved, so that a resume measures the same.
        distribute_bn(model, distributed.world_size(), reduce=False)
    device, workers = next(model.parameters()).device, task.settings.workers
    return extract(model, images, view=task.opened.view, device=device, ids=ids, workers=workers, report=report)


def backbone_of(task: Task, device: torch.device) -> nn.Module:
    """Builds the backbone with its pretrained weights, or random ones by the seed."""
    settings, opened = task.settings, task.opened
    torch.manual_seed(settings.seed)
    # Not `opened.backbone()`: a run may have trained with split batch norms, or another drop_path.
    model = create_backbone(opened.model, channels=opened.channels, size=opened.size, drop_path=settings.drop_path)
    if not settings.scratch:
        model.load_state_dict(dict(opened.weights))
    return model.to(device)


def model_input(
    opened: PretrainedBackbone, views: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch _ height width"]:
    """Converts views to the channels, mean and std of the backbone's input."""
    # Mixing works in place.
    return renormalised(views.expand(-1, opened.channels, -1, -1).contiguous(), opened.view.mean, opened.view.std)


def _with_view(opened: PretrainedBackbone, views: ViewsSettings) -> PretrainedBackbone:
    """The backbone with another standard view, where the settings name one."""
    view = opened.view
    named = views.resolve(size=view.size, channels=view.channels, mean=view.mean, std=view.std)
    assert named.mean is not None
    assert named.std is not None
    crop_pct = views.crop_pct or view.crop_pct
    return replace(opened, view=replace(view, crop_pct=crop_pct, mean=named.mean, std=named.std))


def _hold_out(labels: Tensor, chosen: Tensor, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    if settings.held_out == 0:
        return chosen, chosen[:0]
    among = torch.full_like(labels, -1)
    among[chosen] = labels[chosen]
    try:
        return hold_out(among, share=settings.held_out, seed=settings.seed)
    except ValueError:
        # Too few of each class for the share to be one image.
        return chosen, chosen[:0]
