"""Settings of fine-tuning: trained layers, learning rates, labels and budget."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from manyviews.config import Settings
from manyviews.data import Data, shorthand
from manyviews.views import ViewsSettings
from manyviews.views.pipeline import Mean, Std

Mode = Literal["full", "linear_then_full", "last_blocks"]


class GentleViews(ViewsSettings):
    """One view of each image, less changed than for pretraining: it must still show its class."""

    num_views: int = Field(1, ge=1, le=1)
    """A classifier sees one view of each image at a time."""
    local: int = Field(0, ge=0, le=0)
    """No further views."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Share of the shorter side that is measured on: it is resized to size / crop_pct, then the centre is cropped;
    null: the backbone's own."""
    mean: Mean | tuple[Mean, ...] | None = None
    """Mean of the input in [0, 1], one for all channels or one for each; null: the backbone's own."""
    std: Std | tuple[Std, ...] | None = None
    """Standard deviation of the input, likewise."""
    crop_scale: tuple[float, float] | None = (0.6, 1.0)
    """Smallest and largest share of the image's area that a crop shows."""
    brightness: float | None = Field(0.0, ge=0, le=100)
    """Strength x: the brightness factor is uniform in 1 - x to 1 + x."""
    contrast: float | None = Field(0.0, ge=0, le=100)
    """Strength x: the contrast factor is uniform in 1 - x to 1 + x."""
    saturation: float | None = Field(0.0, ge=0, le=100)
    """Strength x: the saturation factor is uniform in 1 - x to 1 + x; needs three channels."""
    hue: float | None = Field(0.0, ge=0, le=0.5)
    """Largest hue shift in turns, either way; needs three channels."""
    gamma: float | None = Field(0.0, ge=0, le=3)
    """Strength x: values are raised to a power log-uniform in exp(-x) to exp(x)."""
    greyscale: float | None = Field(0.0, ge=0, le=1)
    """Probability of losing the colours; needs three channels."""
    blur: float | None = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur (kernel: the odd number next to a tenth of the side)."""


class FinetuneSettings(Settings):
    """One classifier, from backbone and labels to its score."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    data: Data | None = None
    """The labelled images: a folder with one sub-folder per class, or with a table (data.labels=labels.csv); null: the
    run's own."""
    output: str | None = None
    """The folder that is written; by default runs/ and the run's name with -finetuned, or -scratch."""
    resume: bool = False
    """Resume from the newest valid checkpoint in the output folder, bit for bit; on a GPU with deterministic."""
    elastic: bool = False
    """Resume on another number of processes than the checkpoint was written by, where they give the same batch:
    from the same sample, but not bit for bit."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The choice of labelled images, the head, order, views and mixing all follow from it."""
    pretrained: bool | None = None
    """For a timm name: true for its published weights (downloaded), false for random ones."""
    scratch: bool = False
    """The baseline: random weights instead of the pretrained ones, all else equal."""
    mode: Mode = "linear_then_full"
    """What moves. full: everything, under a random head; linear_then_full: everything, under a head that starts as the
    linear probe (Kumar et al. 2022); last_blocks: the head and the last blocks."""
    blocks: int = Field(1, ge=0, le=1000)
    """Of last_blocks: how many of timm's layers below the head; 0: the head alone."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the labels that is used, of each class alike, at least one image of each; less is a part of more."""
    held_out: float = Field(0.2, ge=0, le=0.5)
    """Share of these labelled images, of each class alike, that chooses the best checkpoint; 0: the last one is it."""
    epochs: float = Field(20, gt=0, le=1_000_000)
    """Passes over the images that are trained on; with few labels min_steps rules."""
    min_steps: int = Field(300, ge=0, le=100_000_000)
    """Fewest steps of a run in epochs: with few labels an epoch is a step or two."""
    minutes: float | None = Field(None, gt=0, le=10_000_000)
    """Wall-clock minutes, instead of epochs; the schedule then follows the clock."""
    batch_size: int = Field(128, ge=2, le=1_048_576)
    """Images per step over all processes together; no more than there are to train on."""
    rate: float = Field(2e-3, gt=0, le=1e30)
    """Peak learning rate of the head (adamw); it falls to zero along a cosine."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Each layer below moves at this share of the rate of the one above (timm's layers; Bao et al. 2022)."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the run in which the rate rises linearly from zero."""
    warmup_steps: int = Field(100, ge=0, le=1_000_000_000)
    """Fewest steps of that rise where the head begins as the linear probe, which a short run would only damage: one of
    fewer steps does not come to its peak rate."""
    weight_decay: float = Field(0.05, ge=0, le=1e4)
    """Not on norms and biases."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of each label that is spread over all classes."""
    mixup: float | None = Field(None, ge=0, le=1000)
    """Images are mixed in pairs by a share from Beta(x, x) (Zhang et al. 2018); 0: never. By default 0.2, and 0 where
    the head begins as the linear probe."""
    cutmix: float = Field(0.0, ge=0, le=1000)
    """Boxes change places in pairs of images, their share from Beta(x, x) (Yun et al. 2019); 0: never."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: largest probability to skip a block."""
    ema: float = Field(0.99, ge=0, lt=1)
    """Decay of the running average of the weights, which is what is measured and kept; 0: the weights themselves."""
    views: GentleViews = GentleViews()
    """What is done to the images that are trained on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training; auto: bf16 where the device is built for it. Measuring is always fp32."""
    deterministic: bool = False
    """On a GPU, take deterministic algorithms, which are slower: without them a resume is not bit for bit there."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Processes or threads that decode images, for each process; null: 2, or with a GPU its share of the cores."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process on the CPU; null: the cores divided among the processes."""
    checks: int = Field(20, ge=1, le=100_000)
    """How many times in the run the held-out part is measured; the best of them is kept."""
    log_every: int = Field(10, ge=1, le=1_000_000_000)
    """Steps between two lines of metrics."""
    save_minutes: float = Field(5, gt=0, le=10_000_000)
    """Minutes between two checkpoints."""
    keep: int = Field(2, ge=1, le=100_000)
    """Checkpoints that stay; the older ones go after a new one is safe."""

    @property
    def mixing(self) -> float:
        """The parameter of mixup; by default 0 for a probe, whose logits are confident."""
        return (0.0 if self.mode == "linear_then_full" else 0.2) if self.mixup is None else self.mixup

    @model_validator(mode="after")
    def _blocks_have_their_mode(self) -> "FinetuneSettings":
        if "blocks" in self.model_fields_set and self.mode != "last_blocks" and self.blocks != 1:
            raise ValueError(f"blocks={self.blocks} is for mode=last_blocks, not {self.mode}; leave it out")
        return self
