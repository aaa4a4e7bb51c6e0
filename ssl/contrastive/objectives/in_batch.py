"""In-batch contrast: every other image of the whole batch, over all processes, is a negative."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from contrastive import distributed
from contrastive.objectives.loss import (
    Loss,
    Objective,
    ObjectiveSettings,
    Temperature,
    average,
    cross_entropy,
    float32_island,
    information,
)
from contrastive.similarity import log_sum_exp, normalize


class InBatch(ObjectiveSettings):
    """NT-Xent, also called InfoNCE (Chen et al. 2020, SimCLR, equation 1), and three other ways to count negatives.

    The defaults are SimCLR's for ImageNet; for CIFAR-10 it takes a temperature of 0.5. The negatives per anchor grow
    with the batch and the processes, and not with gradient accumulation.
    """

    name: Literal["in_batch"] = "in_batch"
    temperature: Temperature = 0.1
    """Divides the similarities; smaller: harder negatives count more."""
    decoupled: bool = False
    """Leave the positive out of the denominator (Yeh et al. 2022, DCL): better with small batches."""
    positive_probability: float = Field(0.0, ge=0, lt=1)
    """How often a negative is in truth of the anchor's class, for which the sum is corrected (Chuang et al. 2020)."""
    hardness: float = Field(0.0, ge=0)
    """Weigh negatives by how similar they are, exp(hardness · similarity / temperature) (Robinson et al. 2021)."""

    @model_validator(mode="after")
    def _has_bounded_gradients(self) -> "InBatch":
        if self.decoupled and self.positive_probability:
            raise ValueError(
                f"decoupled and positive_probability {self.positive_probability} exclude each other: the corrected sum "
                "may come near zero, where without the positive beside it its gradient has no bound; "
                "set decoupled=false or positive_probability=0"
            )
        return self

    @property
    def fewest_views(self) -> int:
        """A positive is another view."""
        return 2

    def build(self, *, dim: int, num_images: int, seed: int) -> Objective:
        """The objective; it has no state, so the arguments change nothing."""
        return InBatchObjective(self)


class InBatchObjective(Objective):
    """The in-batch loss with its settings; it keeps no state."""

    def __init__(self, settings: InBatch) -> None:
        super().__init__()
        self.settings = settings

    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors against the embeddings of all processes."""
        settings = self.settings
        return nt_xent(
            embeddings,
            ids,
            settings.temperature,
            decoupled=settings.decoupled,
            positive_probability=settings.positive_probability,
            hardness=settings.hardness,
        )


@float32_island
def nt_xent(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    temperature: float,
    *,
    decoupled: bool = False,
    positive_probability: float = 0.0,
    hardness: float = 0.0,
) -> Loss:
    """The normalised-temperature cross-entropy of each embedding against the embeddings of the whole batch.

    An anchor's positives are the other views of its image; with more than two views the loss is the mean over them.
    Its negatives are all embeddings of another id, on every process: an image that comes twice, or another image of
    the same label, is neither. The mean over anchors is the usual loss; SimCLR's own code returns twice that.

    What stands for the negatives in the denominator is Σ exp(s/τ); with `hardness` a weighted sum, with
    `positive_probability` what `debiased` makes of it, with `decoupled` all of the denominator. An anchor without
    negatives adds nothing.

    Raises:
        ValueError: if there is one view only.
    """
    views, batch, _ = embeddings.shape
    if views < 2:
        raise ValueError(
            f"an in-batch loss contrasts 2 views or more of each image, not {views}; set views.num_views=2"
        )
    embeddings = normalize(embeddings)
    # Each ordered pair of views: [anchor's view, positive's view, image].
    similarities = torch.einsum("vbd,wbd->vwb", embeddings, embeddings)
    positives = similarities[~torch.eye(views, dtype=torch.bool, device=ids.device)].view(views, views - 1, batch)
    counts = (views * other_images(ids)).to(positives.dtype)
    negatives = _negatives(embeddings, ids, temperature, hardness, counts)
    negatives, logits = negatives.unsqueeze(1).expand_as(positives), positives / temperature
    if positive_probability:
        negatives = debiased(negatives, logits, counts, positive_probability, temperature)
    if decoupled:
        losses = (negatives - logits).masked_fill(negatives.isneginf(), 0)
    else:
        losses = cross_entropy(negatives, logits)
    total = average(losses.mean(1).flatten())
    terms = {"positive_similarity": positives.detach().mean(), "negatives": counts.mean()}
    if not (decoupled or positive_probability or hardness):
        terms |= information(total, counts.mean() + 1)
    return Loss(total, terms)


def debiased(
    negatives: Float[Tensor, "*pairs batch"],
    positives: Float[Tensor, "*pairs batch"],
    counts: Float[Tensor, " batch"],
    positive_probability: float,
    temperature: float,
) -> Float[Tensor, "*pairs batch"]:
    """The log of the sum over true negatives, from that over all and the positive (Chuang et al. 2020, equation 8).

    Of N negatives a share τ⁺ are expected to be positives, each like the positive at hand: what is left is
    (Σ − τ⁺ N e^p) / (1 − τ⁺), but no less than N e^(−1/τ), the least a sum over N can be. Where that bound holds, the
    gradient is zero, as in the authors' code; unlike theirs, nothing is exponentiated.

    Args:
        negatives: log Σ, for each pair of an anchor and a positive.
        positives: the positives' logits, p.
        counts: N, the negatives of each anchor.
        positive_probability: τ⁺, in (0, 1).
        temperature: τ.
    """
    counts = counts.log()
    excess = positives + (counts + math.log(positive_probability)) - negatives
    left = excess < 0
    # Both branches of a `where` have a gradient: the one not taken must be finite.
    rest = negatives + torch.log(-torch.expm1(excess.where(left, -1))) - math.log1p(-positive_probability)
    least = (counts - 1 / temperature).expand_as(rest)
    return rest.where(left & (rest > least), least)


def other_images(ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each image the number of images in the batches of all processes that have another id."""
    ordered = distributed.gather_without_gradient(ids).sort().values
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return len(ordered) - equal


def _negatives(
    embeddings: Tensor, ids: Tensor, temperature: float, hardness: float, counts: Tensor
) -> Float[Tensor, "views batch"]:
    """The log of the sum over each anchor's negatives; with hardness N times their weighted mean.

    The weights e^(βs/τ) join the terms e^(s/τ), and their own sum normalises them; the gradient goes through both, as
    in the authors' code.
    """
    views, batch, _ = embeddings.shape
    anchors, anchor_ids = embeddings.flatten(0, 1), ids.repeat(views)
    sums = log_sum_exp(anchors, None, temperature / (1 + hardness), query_ids=anchor_ids).view(views, batch)
    if not hardness:
        return sums
    weights = log_sum_exp(anchors, None, temperature / hardness, query_ids=anchor_ids).view(views, batch)
    return (sums - weights + counts.log()).where(counts > 0, -torch.inf)
