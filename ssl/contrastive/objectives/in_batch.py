"""In-batch contrast: every other image of the whole batch, over all processes, is a negative."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.objectives.loss import Loss, Objective, ObjectiveSettings, Temperature, cross_entropy, float32_island
from contrastive.similarity import log_sum_exp, normalize


class InBatch(ObjectiveSettings):
    """NT-Xent, also called InfoNCE (Chen et al. 2020, SimCLR, equation 1).

    The defaults are SimCLR's for ImageNet; for CIFAR-10 it takes a temperature of 0.5. The negatives per anchor grow
    with the batch and the processes, and not with gradient accumulation.
    """

    name: Literal["in_batch"] = "in_batch"
    temperature: Temperature = 0.1
    """Divides the similarities; smaller: harder negatives count more."""
    decoupled: bool = False
    """Leave the positive out of the denominator (Yeh et al. 2022, DCL): better with small batches."""

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
        return nt_xent(embeddings, ids, self.settings.temperature, decoupled=self.settings.decoupled)


@float32_island
def nt_xent(
    embeddings: Float[Tensor, "views batch dim"],
    ids: Int[Tensor, " batch"],
    temperature: float,
    *,
    decoupled: bool = False,
) -> Loss:
    """The normalised-temperature cross-entropy of each embedding against the embeddings of the whole batch.

    An anchor's positives are the other views of its image; with more than two views the loss is the mean over them.
    Its negatives are all embeddings of another id, on every process: an image that comes twice, or another image of
    the same label, is neither. The mean over anchors is the usual loss; SimCLR's own code returns twice that.

    With `decoupled` an anchor that has no negative adds nothing, for its loss would be −inf.

    Raises:
        ValueError: if there is one view only.
    """
    views, batch, _ = embeddings.shape
    if views < 2:
        raise ValueError(
            f"an in-batch loss contrasts 2 views or more of each image, not {views}; set views.num_views=2"
        )
    embeddings = normalize(embeddings)
    anchors, anchor_ids = embeddings.flatten(0, 1), ids.repeat(views)
    key_ids = distributed.gather_without_gradient(anchor_ids)
    if distributed.size() == 1:
        negatives = log_sum_exp(anchors, None, temperature, query_ids=anchor_ids)
    else:
        keys = distributed.gather(anchors)
        negatives = log_sum_exp(anchors, keys, temperature, query_ids=anchor_ids, key_ids=key_ids)
    # Each ordered pair of views: [anchor's view, positive's view, image].
    similarities = torch.einsum("vbd,wbd->vwb", embeddings, embeddings)
    positives = similarities[~torch.eye(views, dtype=torch.bool, device=ids.device)].view(views, views - 1, batch)
    negatives, logits = negatives.view(views, 1, batch), positives / temperature
    if decoupled:
        losses = (negatives - logits).masked_fill(negatives.isneginf(), 0)
    else:
        losses = cross_entropy(negatives.expand_as(logits), logits)
    terms = {"positive_similarity": positives.detach().mean(), "negatives": _mean_negatives(anchor_ids, key_ids)}
    return Loss(losses.mean(), terms)


def _mean_negatives(anchor_ids: Tensor, key_ids: Tensor) -> Tensor:
    ordered = key_ids.sort().values
    equal = torch.searchsorted(ordered, anchor_ids, right=True) - torch.searchsorted(ordered, anchor_ids)
    return len(key_ids) - equal.float().mean()
