"""From views to embeddings: backbone, projector, predictor, and the momentum encoder."""

import copy
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from manyviews.config import Settings
from manyviews.encoder.backbone import create_backbone, summary, widths
from manyviews.encoder.batch_norm import split_batch_norms

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

    def build(self, *, channels: int, size: int, local_size: int | None = None) -> "Encoder":
        """Builds the encoder for square images, of a second size too; raises as `create_backbone` and `widths` do."""
        backbone = create_backbone(
            self.name,
            channels=channels,
            size=size,
            pretrained=self.pretrained,
            drop_path=self.drop_path,
            several_sizes=local_size is not None,
            key="encoder.pretrained",
        )
        num_features, width = widths(backbone, channels=channels, size=size)
        if local_size is not None:
            _, local_width = widths(backbone, channels=channels, size=local_size, key="views.local_size")
            if local_width != width:
                raise ValueError(
                    f"encoder.name={self.name} returns {width:,} features of {size} pixels and {local_width:,} of "
                    f"{local_size}, and local views share the projector; set views.local=0, or take another encoder"
                )
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
    """Outputs of an encoder, not normalised."""

    embeddings: Float[Tensor, "views batch dim"]
    """Input of the loss: the predictions, or without a predictor the projections."""
    projections: Float[Tensor, "views batch dim"]
    """The projector's output; without a predictor the same tensor."""


class Encoder(nn.Module):
    """A timm backbone without classifier, a projector, and a predictor, which may be empty.

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

    def forward(self, *groups: Float[Tensor, "_ batch channels _ _"]) -> Embedded:
        """Embeddings and projections of all views, of a group for each size.

        A group passes the backbone at once, so that its batch norms have the statistics of one size; projector and
        predictor get all views together (as the code of Caron et al. 2020, SwAV).
        """
        features = [summary(self.backbone, views.flatten(0, 1)) for views in groups]
        projections: Tensor = self.projector(torch.cat(features) if len(features) > 1 else features[0])
        embeddings: Tensor = self.predictor(projections)
        shape = sum(len(views) for views in groups), groups[0].shape[1], -1
        return Embedded(embeddings.view(shape), projections.view(shape))


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
