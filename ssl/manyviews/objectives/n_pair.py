"""N-pair loss (Sohn 2016): each pair of an id against one side of the pairs of other ids."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from manyviews.engine import log_sum_exp, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import NUMBER, Cost, Sizes, gathered_traffic, softmax_traffic
from manyviews.objectives.losses import (
    Gathered,
    cross_entropy,
    float32_island,
    gather_views,
    information,
    share_of_mean,
    softplus,
)
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits

Form = Literal["multi_class", "one_vs_one"]


class NPair(ObjectiveSettings):
    """N-pair loss (Sohn 2016) of embeddings that are not normalised.

    The pairs are two views of an image, or with ids=labels two images of a class; `train.images_per_class=2` makes
    the paper's batches, with one pair for each class.
    """

    name: Literal["n_pair"] = "n_pair"
    form: Form = "multi_class"
    """One softmax over the positives of all pairs (N-pair-mc), or a logistic loss for each negative (one-vs-one)."""
    symmetric: bool = False
    """The mean of the loss and of that with anchors and positives exchanged; the paper's anchors are one half."""
    norm_penalty: float = Field(3e-3, ge=0, le=1e6)
    """Times half the mean squared length of the embeddings: what keeps them short (section 3.2.2)."""

    @property
    def traits(self) -> Traits:
        """N-pair-mc is InfoNCE of the products."""
        return Traits(pairs_off=True, compares_embeddings=True, bounds_information=self.form == "multi_class")

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of the first of each pair (views, or images of a class) against all second ones."""
        _, views, batch, dim, _ = sizes
        pairs, of_an_id = (views // 2 * batch, views // 2) if views > 1 else (batch // 2, 1)
        ways = 2 if self.symmetric else 1
        traffic, products = gathered_traffic(sizes), ways * 3 * pairs**2 * dim
        if self.form == "multi_class":
            # The softmax itself; in backward its sums' gradients go to all keys, whose own gradient stays.
            traffic += ways * pairs * NUMBER + ways * softmax_traffic(pairs, dim)
            products = ways * 4 * pairs**2 * dim
        return sizes.cost(pairs - of_an_id, traffic=traffic, products=products)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state."""
        options = self.model_dump(exclude={"name"})
        return Stateless(lambda z, ids, _: n_pair(z, ids, **options))


class Pairs(NamedTuple):
    """Indices of the two embeddings of each pair."""

    anchors: Int[Tensor, " pairs"]
    positives: Int[Tensor, " pairs"]


@float32_island
def n_pair(embeddings: Embeddings, ids: Ids, *, form: Form, symmetric: bool, norm_penalty: float) -> Loss:
    """Mean over pairs (f, f⁺) of the loss of f⁺ against the positives f⁻ of other ids.

    With s = f·f⁻ − f·f⁺ that is log(1 + Σ e^s) for N-pair-mc and Σ log(1 + e^s) one-vs-one (Sohn 2016, section 3.2).
    Added to it is norm_penalty / 2 times the mean squared length of the embeddings of all pairs (section 3.2.2). The
    paper gives no weight; TensorFlow's loss has a quarter of 3e-3 times the sum of the two sides' means, which is the
    default here.

    The paper draws one pair from each class. If a batch has more embeddings of an id, they make pairs in the order of
    the whole batch (`pairs_of`), and the positives of all pairs of other ids are negatives; pairs of the same id are
    not compared. Without any pair the loss is 0.
    """
    embeddings = at_least_float32(embeddings)
    rows, gathered = embeddings.flatten(0, 1), gather_views(embeddings, ids)
    pairs = pairs_of(gathered.ids)
    directions = (pairs, Pairs(pairs.positives, pairs.anchors)) if symmetric else (pairs,)
    results = [_one_way(rows, gathered, direction, form) for direction in directions]
    losses, positives, negatives, cosines = (torch.cat(parts) for parts in zip(*results, strict=True))
    count = torch.tensor(len(positives), device=ids.device)
    # One-vs-one a direction's losses are one number, their sum.
    loss = share_of_mean(losses.sum(), count)
    if norm_penalty:
        members = _marked(torch.cat(pairs), gathered)
        loss = loss + norm_penalty / 2 * share_of_mean(rows.square().sum(1).where(members, 0).sum(), members.sum())
    terms = {
        "positive_similarity": share_of_mean(cosines.sum(), count),
        "negatives": share_of_mean(negatives.sum(), count),
    }
    if form == "multi_class":
        terms |= information(losses, 1 + negatives)
    return Loss(loss, terms)


def _one_way(rows: Tensor, gathered: Gathered, pairs: Pairs, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of this rank's anchors (or their sum), products, negatives, cosines of positives."""
    own_ids = gathered.ids[gathered.own]
    # Each rank has the pairs whose anchors are its own; their positives may be another's.
    partners = torch.full_like(gathered.ids, -1).index_copy_(0, pairs.anchors, pairs.positives)[gathered.own]
    paired = partners >= 0
    anchors, anchor_ids, partners = rows[paired], own_ids[paired], partners[paired]
    positives = (anchors * gathered.rows[partners]).sum(1)
    if form == "multi_class":
        keys = _marked(pairs.positives, gathered)
        others = log_sum_exp(anchors, rows[keys], 1.0, query_ids=anchor_ids, key_ids=own_ids[keys])
        losses = cross_entropy(others, positives)
    else:
        candidate_ids = gathered.ids[pairs.positives]

        def term(tile: slice, products: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            losses = softplus(products - own[tile, None])
            return losses.where(anchor_ids[tile, None] != candidate_ids, 0).sum(), products.new_zeros(1)

        losses = sum_over_tiles(anchors, gathered.rows[pairs.positives], term, positives)[0][None]
    with torch.no_grad():
        cosines = F.cosine_similarity(anchors, gathered.rows[partners], eps=1e-6)
        present, counts = gathered.ids[pairs.positives].unique(return_counts=True)
        negatives = (len(pairs.positives) - counts[torch.searchsorted(present, anchor_ids)]).to(rows.dtype)
    return losses, positives, negatives, cosines


def pairs_of(ids: Int[Tensor, " all"]) -> Pairs:
    """Pairs the embeddings of each id in order: first with second, third with fourth, and so on.

    The last of an odd number has no partner. Two views of each image, laid out view by view, make pairs of view 0 and
    view 1; several images of a class come before their next views, which makes pairs of two images.

    Examples:
        >>> pairs = pairs_of(torch.tensor([7, 3, 7, 7, 3]))
        >>> pairs.anchors.tolist(), pairs.positives.tolist()
        ([1, 0], [4, 2])
    """
    order = ids.argsort(stable=True)
    ordered, positions = ids[order], torch.arange(len(ids), device=ids.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    occurrence = positions - positions.where(begins, 0).cummax(0).values if len(ids) else positions
    first = (occurrence[:-1] % 2 == 0) & ~begins[1:]
    return Pairs(order[:-1][first], order[1:][first])


def _marked(indices: Tensor, gathered: Gathered) -> Tensor:
    """Mask of this rank's embeddings that are at some indices of the whole batch."""
    marked = torch.zeros_like(gathered.ids, dtype=torch.bool).index_fill_(0, indices, True)
    return marked[gathered.own]
