"""One learned row for each id, spread over the processes, and the softmax over them all."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from manyviews.engine import normalize
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes, softmax_traffic
from manyviews.objectives.objective import (
    Embeddings,
    Ids,
    Loss,
    Objective,
    Population,
    average,
    float32_island,
    information,
    softmax_cross_entropy,
)
from manyviews.objectives.sharded_rows import check_ids, fetch, unit_rows
from manyviews.system import distributed


class LearnedRows(Objective):
    """An objective whose state is one row for each id, in `weight`; each process holds those of its share of the ids.

    The rows begin as random unit rows and are moved by the optimiser; their gradient on each process is the sum over
    the processes' losses.
    """

    def __init__(self, population: Population, *, dim: int, seed: int) -> None:
        super().__init__()
        self.classes = population.size
        self.own = distributed.share(self.classes)
        self.weight = nn.Parameter(unit_rows(self.own, dim, seed=seed))

    def shards(self) -> dict[str, int]:
        """The rows."""
        return {"weight": self.classes}

    def own_ids(self) -> Int[Tensor, " rows"]:
        """The ids whose rows this process holds."""
        return torch.arange(self.own.start, self.own.stop, device=self.weight.device)


class RowSoftmax(LearnedRows):
    """The parametric softmax that `bank` compares with: a softmax over one learned row per image.

    P(i|f) = exp(wᵢ·f/τ) / Σⱼ exp(wⱼ·f/τ) (Wu et al. 2018, equation 1, with its temperature). The weights begin as
    the bank's rows do and are free in length.
    """

    def __init__(self, temperature: float, *, dim: int, population: Population, seed: int) -> None:
        super().__init__(population, dim=dim, seed=seed)
        self.temperature = temperature

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Embeddings | None, step: int) -> Loss:
        """The cross-entropy of this process's anchors, each image its own class, the mean over views.

        Raises:
            ValueError: if an id is not one of the images (checked on CPU).
        """
        check_ids(ids, self.classes)
        views, lengths = len(embeddings), distributed.counts(len(ids))
        anchors, anchor_ids = normalize(embeddings).flatten(0, 1), ids.repeat(views)
        own_weights = fetch(self.weight, self.own.start, ids, lengths).repeat(views, 1)
        products = (anchors * own_weights).sum(1)
        losses = softmax_cross_entropy(anchors, products, anchor_ids, self.weight, self.own_ids(), self.temperature)
        negatives = torch.tensor(float(self.classes - 1), device=ids.device)
        similarities = products.detach() / torch.linalg.vector_norm(own_weights.detach(), dim=1).clamp(min=1e-6)
        terms = {"positive_similarity": similarities.mean(), "negatives": negatives}
        return Loss(average(losses), terms | information(losses, 1 + negatives.expand_as(losses)))


def row_softmax_cost(sizes: Sizes) -> Cost:
    """The cost of a softmax over learned rows, one for each image or class, with each anchor's own row.

    Not counted, as they are the optimiser's: the gradient of the rows and its averages.
    """
    images, _, batch, dim, _ = sizes
    # The anchors' own rows come from where they are: ids there, rows back.
    traffic = batch * (ID + NUMBER * dim) + softmax_traffic(sizes.anchors, dim)
    # In backward the losses' gradients go to all rows, and those of the anchors' own rows home.
    traffic += sizes.anchors * NUMBER + batch * NUMBER * dim
    products = 4 * sizes.anchors * images * dim
    return sizes.cost(images - 1, traffic=traffic, products=products, rows=images, row_bytes=NUMBER * dim)
