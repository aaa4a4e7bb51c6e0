"""From views to embeddings: backbone, projector, predictor, and the momentum encoder."""

import copy
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from manyviews.config import Settings
from manyviews.encoder.backbone import create_backbone, summary, widths
from manyviews.encoder.batch_norm import split_batch_norms
from manyviews.encoder.context import Context, ContextSettings

WIDEST = 16_384
"""Largest width of a layer: beyond it one layer alone would take a gigabyte."""


class ProjectorSettings(Settings):
    """The perceptron from the backbone's features to the embeddings; not exported."""

    layers: int = Field(2, ge=0, le=8)
    """Linear layers; 0 makes the features the embeddings."""
    hidden: int | None = Field(None, gt=0, le=WIDEST)
    """Width of the hidden layers; null is the number of features."""
    dim: int = Field(128, gt=0, le=WIDEST)
    """Dimension of the embeddings."""
    batch_norm: bool = True
    """Batch norm after each hidden layer."""

    def build(self, num_features: int) -> nn.Sequential:
        """The projector for this number of features; empty without layers."""
        return _perceptron(self, num_features, self.dim)


class PredictorSettings(Settings):
    """A perceptron that predicts one view's projection from another's."""

    layers: int = Field(0, ge=0, le=8)
    """Linear layers; 0: no predictor."""
    hidden: int | None = Field(None, gt=0, le=WIDEST)
    """Width of the hidden layers; null is the dimension of the projections."""
    batch_norm: bool = True
    """Batch norm after each hidden layer."""

    def build(self, dim: int) -> nn.Sequential:
        """The predictor for projections of this dimension; empty without layers."""
        return _perceptron(self, dim, dim)


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
    context: ContextSettings | None = None
    """Cuts each view into patches, whose embeddings are predicted from those above (CPC), for objective=cpc."""

    @model_validator(mode="after")
    def _context_stands_alone(self) -> "EncoderSettings":
        if self.context is not None and self.predictor.layers:
            raise ValueError(
                f"predictor.layers={self.predictor.layers} and context={self.context.name} exclude each other: "
                "with a context, objective=cpc predicts, by a matrix for each step; set predictor.layers=0"
            )
        if self.context is not None and self.batch_norm_splits > 1:
            raise ValueError(
                f"batch_norm_splits={self.batch_norm_splits} is for a momentum twin, and context={self.context.name} "
                "has none; set batch_norm_splits=1"
            )
        return self

    def build(self, *, channels: int, size: int, local_size: int | None = None) -> "Encoder":
        """Builds the encoder for square images, of a second size too; raises as `create_backbone` and `widths` do.

        With a `context` the second size is that of its patches.
        """
        second, key = (local_size, "views.local_size")
        if self.context is not None:
            second, key = self.context.grid(size).side, "encoder.context.patches"
        backbone = create_backbone(
            self.name,
            channels=channels,
            size=size,
            pretrained=self.pretrained,
            drop_path=self.drop_path,
            several_sizes=second is not None,
            key="encoder.pretrained",
        )
        num_features, width = widths(backbone, channels=channels, size=size)
        if second is not None:
            _, second_width = widths(backbone, channels=channels, size=second, key=key)
            if second_width != width:
                cure = "set views.local=0, or take" if self.context is None else "take"
                raise ValueError(
                    f"encoder.name={self.name} returns {width:,} features of {size} pixels and {second_width:,} of "
                    f"{second} ({key}), which share the projector; {cure} another encoder"
                )
        projector = self.projector.build(width)
        dim = self.projector.dim if self.projector.layers else width
        predictor = self.predictor.build(dim)
        context = None if self.context is None else self.context.build(size=size, dim=dim)
        return Encoder(
            backbone,
            projector,
            predictor,
            context,
            num_features=num_features,
            dim=dim,
            batch_norm_splits=self.batch_norm_splits,
        )


class Embedded(NamedTuple):
    """Outputs of an encoder, not normalised."""

    embeddings: Float[Tensor, "views batch dim"]
    """Input of the loss: the predictions, or without a predictor the projections; with a context, the projections of
    all patches, then their contexts."""
    projections: Float[Tensor, "views batch dim"]
    """The projector's output; without a predictor the same tensor."""


class Encoder(nn.Module):
    """A timm backbone without classifier, a projector, a predictor, which may be empty, and a context or none.

    `num_features` is the width of the backbone's features, `dim` that of the embeddings. The projector reads the
    backbone's `forward_summary` where it has one.

    Examples:
        >>> encoder = EncoderSettings().build(channels=1, size=28)
        >>> encoder(torch.zeros(2, 3, 1, 28, 28), torch.zeros(4, 3, 1, 12, 12)).embeddings.shape
        torch.Size([6, 3, 128])
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Sequential,
        predictor: nn.Sequential,
        context: Context | None = None,
        *,
        num_features: int,
        dim: int,
        batch_norm_splits: int = 1,
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor, self.context = backbone, projector, predictor, context
        self.num_features, self.dim = num_features, dim
        self.batch_norm_splits = batch_norm_splits
        if batch_norm_splits > 1:
            split_batch_norms(self, batch_norm_splits, interleaved=True)

    def forward(self, *groups: Float[Tensor, "_ batch channels _ _"]) -> Embedded:
        """Embeddings and projections of all views, of a group for each size.

        A group passes the backbone at once, so that its batch norms have the statistics of one size; projector and
        predictor get all views together (as the code of Caron et al. 2020, SwAV). With a context, the patches of views
        pass in their place.
        """
        if self.context is not None:
            groups = tuple(self.context.patches_of(views) for views in groups)
        features = [summary(self.backbone, views.flatten(0, 1)) for views in groups]
        projections: Tensor = self.projector(torch.cat(features) if len(features) > 1 else features[0])
        embeddings: Tensor = self.predictor(projections)
        shape = sum(len(views) for views in groups), groups[0].shape[1], -1
        embeddings, projections = embeddings.view(shape), projections.view(shape)
        if self.context is not None:
            embeddings = torch.cat([embeddings, self.context(embeddings)])
        return Embedded(embeddings, projections)

    def per_image(self, views: int) -> int:
        """Number of embeddings of an image of so many views."""
        return views if self.context is None else 2 * self.context.grid.patches**2

    def of_images(self, embeddings: Float[Tensor, "embeddings batch dim"]) -> Float[Tensor, "_ batch dim"]:
        """Embeddings of whole images, to monitor; of patches the mean, and that of their contexts."""
        return embeddings if self.context is None else embeddings.unflatten(0, (2, -1)).mean(1)


class MomentumTwin(nn.Module):
    """Momentum encoder: w' <- momentum w' + (1 - momentum) w (He et al. 2020, equation 2).

    It starts as an exact copy, shares no storage with the encoder and gets no gradient. Running statistics of batch
    norms follow as the weights do; counters are copied. (The authors' code leaves the statistics to the twin's own
    passes; in training mode, in which both run, they have no effect.) Where the encoder splits its batch norms, the
    twin splits them into other parts. It has no predictor: its projections are the targets.
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
    """Moving average: state <- momentum state + (1 - momentum) leader's, which may have more.

    A tensor that several layers share moves once, and counters are copied.
    """
    state, other = module.state_dict(), leader.state_dict()
    own = {name: state[name] for name in {value.data_ptr(): name for name, value in state.items()}.values()}
    following = [name for name, value in own.items() if value.is_floating_point()]
    get_ema_multi_avg_fn(momentum)([own[name] for name in following], [other[name] for name in following], None)
    for name in own.keys() - set(following):
        own[name].copy_(other[name])


def _perceptron(settings: ProjectorSettings | PredictorSettings, inputs: int, outputs: int) -> nn.Sequential:
    hidden_widths = [settings.hidden or inputs] * (settings.layers - 1)
    widths = [inputs, *hidden_widths, outputs][: settings.layers + 1]
    modules: list[nn.Module] = []
    for layer, (before, after) in enumerate(itertools.pairwise(widths), start=2):
        hidden = layer < len(widths)
        # A bias before a batch norm would be subtracted again.
        modules.append(nn.Linear(before, after, bias=not (hidden and settings.batch_norm)))
        if hidden and settings.batch_norm:
            modules.append(nn.BatchNorm1d(after))
        if hidden:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
