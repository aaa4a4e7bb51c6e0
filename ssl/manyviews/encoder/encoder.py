"""From views to embeddings: a timm backbone, a projector, perhaps a predictor, and the momentum twin."""

import copy
import difflib
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import manyviews.encoder.small_models  # noqa: F401  (for its registrations with timm)
from manyviews.config import Settings
from manyviews.encoder.batch_norm import split_batch_norms
from manyviews.encoder.timm_format import (
    HUB,
    LOCAL,
    WEIGHTS,
    TimmFolder,
    hub_folder,
    hub_in_time,
    no_weights,
    other_weights,
    read_folder,
)
from manyviews.system.arrays import read_tensors
from manyviews.system.files import shown

WIDEST = 16_384
"""Numbers of a layer: beyond it one layer alone would take a gigabyte."""
ADAPTED = 1 << 26
"""Weights by which a model may be larger than those that it is given: of other channels, or of larger images."""


class ProjectorSettings(Settings):
    """The perceptron between the backbone's features and the embeddings; not part of the exported backbone."""

    layers: int = Field(2, ge=0, le=8)
    """Linear layers; 0 makes the features the embeddings."""
    hidden: int | None = Field(None, gt=0, le=WIDEST)
    """Width of the hidden layers; null is the number of features."""
    dim: int = Field(128, gt=0, le=WIDEST)
    """Dimension of the embeddings."""
    batch_norm: bool = True
    """Batch norm after each hidden layer."""

    def build(self, num_features: int) -> nn.Sequential:
        """The projector for this number of features."""
        hidden = [self.hidden or num_features] * (self.layers - 1)
        return _perceptron([num_features, *hidden, self.dim][: self.layers + 1], batch_norm=self.batch_norm)


class PredictorSettings(Settings):
    """A perceptron that guesses one view's projection from another's; what it guesses has the projections' dimension.

    Only objectives that contrast predictions with projections want one.
    """

    layers: int = Field(0, ge=0, le=8)
    """Linear layers; 0: no predictor."""
    hidden: int | None = Field(None, gt=0, le=WIDEST)
    """Width of the hidden layers; null is the dimension of the projections."""
    batch_norm: bool = True
    """Batch norm after each hidden layer."""

    def build(self, dim: int) -> nn.Sequential:
        """The predictor for projections of this dimension; empty, which changes nothing, without layers."""
        hidden = [self.hidden or dim] * (self.layers - 1)
        return _perceptron([dim, *hidden, dim][: self.layers + 1], batch_norm=self.batch_norm)


class EncoderSettings(Settings):
    """A backbone by its timm name, and a projector."""

    name: str = "light_resnet"
    """Any timm model, local-dir:FOLDER, or hf-hub:OWNER/NAME; made for small images: light_resnet, resnet18_small,
    resnet50_small."""
    pretrained: bool = False
    """Start from timm's published weights (downloaded) or, with local-dir:, from the folder's; only with it is a
    network used."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: largest probability to skip a block."""
    batch_norm_splits: int = Field(1, ge=1, le=1024)
    """Parts of a process's batch that are normalised apart; for a momentum twin on a single process."""
    projector: ProjectorSettings = ProjectorSettings()
    """From the features to the embeddings."""
    predictor: PredictorSettings = PredictorSettings()
    """From the projector's output to the embeddings, for objectives that contrast predictions with projections."""

    def build(self, *, channels: int, size: int) -> "Encoder":
        """The encoder for square images; its weights come from torch's global generator.

        Raises:
            ValueError: timm does not know the name, or the model cannot take such images, or has no such option, or
                its weights cannot be had.
        """
        backbone = create_backbone(
            self.name,
            channels=channels,
            size=size,
            pretrained=self.pretrained,
            drop_path=self.drop_path,
            key="encoder.pretrained",
        )
        num_features, width = widths(backbone, channels=channels, size=size)
        projector = self.projector.build(width)
        dim = self.projector.dim if self.projector.layers else width
        return Encoder(
            backbone,
            projector,
            self.predictor.build(dim),
            num_features=num_features,
            dim=dim,
            batch_norm_splits=self.batch_norm_splits,
        )


class Embedded(NamedTuple):
    """What an encoder makes of views, not normalised."""

    embeddings: Float[Tensor, "views batch dim"]
    """What the loss is of: the predictions where there is a predictor, or the projections."""
    projections: Float[Tensor, "views batch dim"]
    """The projector's output; without a predictor the same tensor."""


class Encoder(nn.Module):
    """A timm backbone without classifier, a projector on its features, and a predictor, which may be empty.

    `num_features` is the width of what the backbone returns, `dim` that of the embeddings. A backbone that has
    `forward_summary` chooses itself what the projector reads; its features may then be wider.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Sequential,
        predictor: nn.Sequential,
        *,
        num_features: int,
        dim: int,
        batch_norm_splits: int = 1,
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.num_features, self.dim = num_features, dim
        self.batch_norm_splits = batch_norm_splits
        if batch_norm_splits > 1:
            split_batch_norms(self, batch_norm_splits, interleaved=True)

    def forward(self, views: Float[Tensor, "views batch channels height width"]) -> Embedded:
        """Embeddings and projections of the views; all views go through in one pass and share batch statistics."""
        projections: Tensor = self.projector(summary(self.backbone, views.flatten(0, 1)))
        embeddings: Tensor = self.predictor(projections)
        return Embedded(embeddings.view(*views.shape[:2], -1), projections.view(*views.shape[:2], -1))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """What the backbone makes of normalised images, before the projector."""
        features: Tensor = self.backbone(images)
        return features


class MomentumTwin(nn.Module):
    """A copy of an encoder that follows it slowly: w' <- momentum w' + (1 - momentum) w (He et al. 2020, equation 2).

    It starts as an exact copy, shares no storage with the encoder and gets no gradient. Running statistics of batch
    norms follow as the weights do; counters are copied. (The authors' code leaves the statistics to the twin's own
    passes; in training mode, in which the twin runs as theirs does, they have no effect.) Where the encoder splits its
    batch norms, the twin splits them into other parts. It has no predictor: what is predicted are its projections.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.encoder.predictor = nn.Sequential()
        if encoder.batch_norm_splits > 1:
            split_batch_norms(self.encoder, encoder.batch_norm_splits, interleaved=False)

    @torch.no_grad()
    def forward(self, views: Float[Tensor, "views batch channels height width"]) -> Float[Tensor, "views batch dim"]:
        """Projections of the views, without gradient."""
        embedded: Embedded = self.encoder(views)
        return embedded.projections

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """One step towards the encoder."""
        follow(self.encoder, encoder, momentum)


@torch.no_grad()
def follow(module: nn.Module, leader: nn.Module, momentum: float) -> None:
    """Moves a module's state to `momentum` times itself and 1 - `momentum` times another's, which may have more.

    A tensor that several layers share moves once, and counters are copied.
    """
    state, other = module.state_dict(), leader.state_dict()
    own = {name: state[name] for name in {value.data_ptr(): name for name, value in state.items()}.values()}
    following = [name for name, value in own.items() if value.is_floating_point()]
    get_ema_multi_avg_fn(momentum)([own[name] for name in following], [other[name] for name in following], None)
    for name in own.keys() - set(following):
        own[name].copy_(other[name])


def create_backbone(
    name: str,
    *,
    channels: int,
    size: int,
    pretrained: bool = False,
    drop_path: float = 0.0,
    key: str = "pretrained",
) -> nn.Module:
    """A timm model without classifier, for square images of this size and number of channels.

    Of a folder, and of a model on the hub, config.json is believed as `timm_folder` tells, and weights come from
    model.safetensors alone. Without `pretrained` no network is used; `key` is what asks for it, for messages.

    Raises:
        ValueError: timm does not know the name, or the model has no such option, or its weights cannot be had.
    """
    if name.startswith(HUB):
        if not pretrained:
            raise ValueError(f"{shown(name)} is looked up on a network, which takes pretrained=true")
        name = f"{LOCAL}{hub_folder(name)}"
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": channels, "num_classes": 0}
    model = name
    if name.startswith(LOCAL):
        found = read_folder(Path(name.removeprefix(LOCAL)).expanduser())
        model, fixed = found.architecture, found.described.fixed_input_size
        options |= found.options(pretrained=pretrained)
        if pretrained:
            if not (found.folder / WEIGHTS).is_file():
                raise ValueError(
                    f"{shown(found.folder)} holds no {WEIGHTS}, in which alone weights are read; {key}=false begins "
                    f"with random ones of {shown(model)}"
                )
            # Looked at before timm does: a damaged file is then told in words.
            read_tensors(found.folder / WEIGHTS)
    if not timm.is_model(model.split(".")[0]):
        raise ValueError(f"timm has no model {shown(repr(model))}{_nearest(model)}")
    if model == name:
        description = timm.get_pretrained_cfg(name)
        fixed = description is not None and description.fixed_input_size
        if pretrained and not (description is not None and description.has_weights):
            raise ValueError(f"there are no published weights of {shown(name)}; {key}=false begins with random ones")
    if fixed:
        options["img_size"] = size
    if drop_path:
        options["drop_path_rate"] = drop_path
    if model != name and (found.folder / WEIGHTS).is_file():
        bare = {**options, "pretrained": False}
        check_count(shown(name), (found.folder / WEIGHTS).stat().st_size, lambda: timm.create_model(model, **bare))
    try:
        if not pretrained or model != name:
            return timm.create_model(model, **options)
        with hub_in_time() as unreachable:
            try:
                return timm.create_model(model, **options)
            except TypeError:
                raise
            except Exception as problem:
                raise ValueError(no_weights(name, problem, unreachable, key)) from problem
    except TypeError as problem:
        raise ValueError(f"{shown(name)} does not take {', '.join(options)}: {problem}") from problem
    except Exception as problem:
        if model == name:
            raise
        raise ValueError(_of_another_model(found, options, problem)) from problem


def _of_another_model(found: TimmFolder, options: Mapping[str, Any], problem: Exception) -> str:
    """Why a folder's weights do not go into the model that it names."""
    plain = {**options, "pretrained": False, "num_classes": found.described.num_classes}
    with suppress(Exception):  # the model itself cannot be made as the folder describes it
        model = timm.create_model(found.architecture, **plain).state_dict()
        if said := other_weights(found.folder, found.architecture, model, read_tensors(found.folder / WEIGHTS)):
            return said
    return (
        f"{shown(found.folder)} does not make {shown(found.architecture)} ({type(problem).__name__}: "
        f"{shown(problem)}); its {WEIGHTS} and config.json must be of one model"
    )


def weight_count(build: Callable[[], nn.Module]) -> int | None:
    """How many weights a module has, which is built without memory; None where that cannot be."""
    try:
        # The meta device knows shapes alone.
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            return sum(parameter.numel() for parameter in build().parameters())
    except Exception:
        # What is wrong with it is said where it is built in earnest.
        return None


def check_count(name: str, held: int, build: Callable[[], nn.Module]) -> None:
    """Refuses a model of more weights than the bytes that hold them, before it is built: its description is not theirs.

    Args:
        name: of the model.
        held: bytes; a weight has one at least.
        build: makes the model.

    Raises:
        ValueError: with both.
    """
    count = weight_count(build) or 0
    # Channels and size may be others here than those of the weights.
    if count > held + ADAPTED:
        raise ValueError(
            f"{name} describes a model of {count:,} weights, and those beside it have {held:,} bytes: they are not of "
            "each other"
        )


def summary(backbone: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _"]:
    """What the projector reads: the backbone's features, or what the backbone has for the purpose."""
    read: Tensor = getattr(backbone, "forward_summary", backbone)(images)
    return read


@torch.no_grad()
def widths(backbone: nn.Module, *, channels: int, size: int) -> tuple[int, int]:
    """Widths of the backbone's features and of what the projector reads, by a look: `num_features` is not always true.

    Raises:
        ValueError: The backbone cannot take such images.
    """
    training, images = backbone.training, torch.zeros(1, channels, size, size)
    # Not inference mode: a tensor that the model caches on its first pass could never carry a gradient.
    backbone.eval()
    try:
        found = [backbone(images), summary(backbone, images)]
    except (RuntimeError, AssertionError, ValueError) as problem:
        raise ValueError(
            f"{type(backbone).__name__} cannot take {size} x {size} pixels of {channels} channels: {problem}; "
            "set views.size to what it takes, or choose another encoder.name"
        ) from problem
    finally:
        backbone.train(training)
    for features in found:
        if features.ndim != 2:
            raise ValueError(
                f"{type(backbone).__name__} returns {list(features.shape)}, not one vector per image; "
                "choose another encoder.name"
            )
    return found[0].shape[1], found[1].shape[1]


def _perceptron(widths: Sequence[int], *, batch_norm: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=2):
        hidden = layer < len(widths)
        # A bias before a batch norm would be subtracted again.
        modules.append(nn.Linear(inputs, outputs, bias=not (hidden and batch_norm)))
        if hidden and batch_norm:
            modules.append(nn.BatchNorm1d(outputs))
        if hidden:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def _nearest(name: str) -> str:
    names = difflib.get_close_matches(name[:200], timm.list_models(), n=3)
    return f"; did you mean {' or '.join(names)}?" if names else ""
