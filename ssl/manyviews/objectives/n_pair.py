"""N-pair loss (Sohn 2016): each pair of an id against one side of the pairs of other ids."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from manyviews.engine import log_sum_exp, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import NUMBER, Cost, Sizes, gathered_traffic, softmax_traffic
from manyviews.objectives.losses import (
    Gathered,
    average,
    cross_entropy,
    float32_island,
    gather_views,
    information,
    share_of_mean,
    softplus,
)
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.query_losses import FAR, logistic, n_pairs, ordered_pairs, unlike
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits
from manyviews.system import distributed

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
        return Traits(
            pairs_off=True,
            relations=("triplets", "ranked"),
            compares_embeddings=True,
            bounds_information=self.form == "multi_class",
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of the first of each pair (views, or images of a class) against all second ones."""
        views, batch, dim = sizes.views, sizes.batch, sizes.dim
        pairs, of_an_id = (views // 2 * batch, views // 2) if views > 1 else (batch // 2, 1)
        ways = 2 if self.symmetric else 1
        traffic, products = gathered_traffic(sizes), ways * 3 * pairs**2 * dim
        if self.form == "multi_class":
            # The softmax itself; in backward its sums' gradients go to all keys, whose own gradient stays.
            traffic += ways * pairs * NUMBER + ways * softmax_traffic(pairs, dim)
            products = ways * 4 * pairs**2 * dim
        return sizes.cost(pairs - of_an_id, traffic=traffic, products=products)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state.

        Raises:
            ValueError: if queries and items of lists are to be exchanged.
        """
        lists = population.lists
        if lists is not None:
            if self.symmetric:
                raise ValueError(
                    "objective.symmetric=true exchanges anchors and positives, and in relations the query of a list is "
                    "no item of its items' lists; set objective.symmetric=false"
                )
            return Stateless(lambda z, ids, _: n_pair_of_lists(z, ids, lists, self, keys=population.keys), lists)
        options = self.model_dump(exclude={"name"})
        return Stateless(lambda z, ids, _: n_pair(z, ids, **options))


class Pairs(NamedTuple):
    """Indices of the two embeddings of each pair."""

    anchors: Int[Tensor, " pairs"]
    positives: Int[Tensor, " pairs"]
    there: Bool[Tensor, " pairs"]
    """Which of them exist: on a GPU, where their number would be waited for, there are half as many as embeddings."""


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
    directions = (pairs, Pairs(pairs.positives, pairs.anchors, pairs.there)) if symmetric else (pairs,)
    results = [_one_way(rows, gathered, direction, form) for direction in directions]
    losses, there, negatives, cosines = (torch.cat(parts) for parts in zip(*results, strict=True))
    count = there.sum()
    # One-vs-one a direction's losses are one number, their sum.
    loss = share_of_mean(losses.sum(), count)
    if norm_penalty:
        members = _marked(pairs.anchors, pairs, gathered) | _marked(pairs.positives, pairs, gathered)
        loss = loss + norm_penalty / 2 * share_of_mean(rows.square().sum(1).where(members, 0).sum(), members.sum())
    terms = {
        "positive_similarity": share_of_mean(cosines.sum(), count),
        "negatives": share_of_mean(negatives.sum(), count),
    }
    if form == "multi_class":
        terms |= information(losses, 1 + negatives, counted=there)
    return Loss(loss, terms)


@float32_island
def n_pair_of_lists(
    embeddings: Embeddings, ids: Ids, lists: Lists, settings: NPair, *, keys: int | None = None
) -> Loss:
    """Mean over items f⁺ of lists of the loss against the items f⁻ of the same list that are less relevant.

    With the query f it is the loss of `n_pair`: log(1 + Σ exp(f·f⁻ − f·f⁺)), N-pair with several negatives for each
    positive, or one-vs-one Σ log(1 + exp(f·f⁻ − f·f⁺)). Where the batch's other images are items too, they are further
    f⁻, as in the paper's batches. An item without a less relevant one has no loss.

    Examples:
        >>> from manyviews.objectives.relations import Relations
        >>> lists = Lists(Relations("triplets", torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.0]]), size=3))
        >>> views = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])  # both products are 0
        >>> loss = n_pair_of_lists(views, torch.arange(3), lists, NPair(norm_penalty=0.0))
        >>> round(loss.total.item(), 4)  # log 2
        0.6931
    """
    batch = list_batch(embeddings, ids, lists, "product", keys=keys)
    most = batch.items.shape[1]

    def term(some: slice, products: Tensor, relevances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        above, below = unlike(relevances, there)
        if settings.form == "multi_class":
            losses = n_pairs(products, relevances, there)
        else:
            losses = ordered_pairs(products, relevances, logistic, there, most).sum()
        return losses.sum(), torch.stack([above.sum(), below.sum()])

    total, (positives, negatives) = batch.sum(term)
    loss = share_of_mean(total, positives)
    if settings.norm_penalty:
        loss = loss + settings.norm_penalty / 2 * average(at_least_float32(embeddings).flatten(0, 1).square().sum(1))
    return Loss(loss, batch.terms(negatives))


class _Compared(NamedTuple):
    """What a rank compares: anchors with their own positives, and with those of all ranks."""

    anchors: Tensor
    ids: Tensor
    partners: Tensor
    """Index of each anchor's positive in the whole batch."""
    there: Tensor
    keys: Tensor
    """This rank's part of all positives."""
    key_ids: Tensor
    keys_there: Tensor


def _one_way(rows: Tensor, gathered: Gathered, pairs: Pairs, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of this rank's pairs (or their sum), mask of those that exist, negatives, cosines."""
    anchors, anchor_ids, partners, there, keys, key_ids, keys_there = _compared(rows, gathered, pairs)
    positives = (anchors * gathered.rows[partners]).sum(1)
    candidate_ids = gathered.ids[pairs.positives]
    if form == "multi_class":
        queries, keys = _far(anchors, keys, keys_there)
        others = log_sum_exp(queries, keys, 1.0, query_ids=anchor_ids, key_ids=key_ids)
        losses = cross_entropy(others, positives).where(there, 0)
    else:

        def term(tile: slice, products: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            losses = softplus(products - own[tile, None])
            return losses.where(anchor_ids[tile, None] != candidate_ids, 0).sum(), products.new_zeros(1)

        queries, candidates = _far(anchors, gathered.rows[pairs.positives], pairs.there)
        losses = sum_over_tiles(queries, candidates, term, positives.where(there, -FAR))[0][None]
    with torch.no_grad():
        cosines = F.cosine_similarity(anchors, gathered.rows[partners], eps=1e-6).where(there, 0)
        # Ids of what is no pair come last, and are no anchor's.
        present = candidate_ids.where(pairs.there, torch.iinfo(candidate_ids.dtype).max).sort().values
        equal = torch.searchsorted(present, anchor_ids, right=True) - torch.searchsorted(present, anchor_ids)
        negatives = (pairs.there.sum() - equal).to(rows.dtype).where(there, 0)
    return losses, there, negatives, cosines


def _far(queries: Tensor, keys: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the keys that are not there far from all queries, by one more dimension; on a GPU."""
    if keys.device.type == "cpu":
        return queries, keys
    # By eight columns, which products are made for.
    last = keys.new_full((len(keys), 1), FAR).masked_fill(there[:, None], 0)
    return F.pad(F.pad(queries, (0, 1), value=1.0), (0, 7)), F.pad(torch.cat([keys, last], 1), (0, 7))


def _compared(rows: Tensor, gathered: Gathered, pairs: Pairs) -> _Compared:
    """Pairs whose anchors are this rank's; on a GPU, where they would be counted, an equal share."""
    if rows.device.type == "cpu":
        own_ids = gathered.ids[gathered.own]
        # The positives may be another rank's.
        partners = torch.full_like(gathered.ids, -1).index_copy_(0, pairs.anchors, pairs.positives)[gathered.own]
        paired, keys = partners >= 0, _marked(pairs.positives, pairs, gathered)
        there, keys_there = paired[paired], keys[keys]
        return _Compared(rows[paired], own_ids[paired], partners[paired], there, rows[keys], own_ids[keys], keys_there)
    own = distributed.share(len(pairs.there))
    anchors, partners, there = (part[own] for part in pairs)
    ids = gathered.ids[anchors]
    return _Compared(gathered.rows[anchors], ids, partners, there, gathered.rows[partners], ids, there)


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
    if ids.device.type == "cpu":
        return Pairs(order[:-1][first], order[1:][first], first[first])
    # Their number is not known here: all that exist come first, and there are at most as many as halves.
    seats = first.logical_not().byte().argsort(stable=True)[: len(ids) // 2]
    return Pairs(order[:-1][seats], order[1:][seats], first[seats])


def _marked(indices: Tensor, pairs: Pairs, gathered: Gathered) -> Tensor:
    """Mask of this rank's embeddings that are at some indices of the whole batch, one per pair."""
    count = len(gathered.ids)
    # One more place is for those of pairs that do not exist.
    marked = torch.zeros(count + 1, dtype=torch.bool, device=indices.device)
    return marked.index_fill_(0, indices.where(pairs.there, count), True)[gathered.own]
