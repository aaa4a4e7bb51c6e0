"""In-batch contrast: every other image of the whole batch, over all ranks, is a negative."""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes, batch_softmax, softmax_traffic
from manyviews.objectives.losses import average, cross_entropy, float32_island, information
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.system import distributed


class InBatch(ObjectiveSettings):
    """NT-Xent, also called InfoNCE (Chen et al. 2020, SimCLR, equation 1), and three variants.

    With the bilinear score it is the loss of contrastive predictive coding (van den Oord et al. 2018, equations 3, 4).
    The defaults are SimCLR's for ImageNet; its temperature for CIFAR-10 is 0.5. The negatives per anchor grow with the
    batch and the ranks, and not with gradient accumulation.
    """

    traits: ClassVar[Traits] = Traits(
        fewest_views=2, images_only="whose positives are views of one image only", bounds_information=True
    )

    name: Literal["in_batch"] = "in_batch"
    temperature: Temperature = 0.1
    """Divides the similarities; smaller: harder negatives count more."""
    decoupled: bool = False
    """Leave the positive out of the denominator (Yeh et al. 2022, DCL): better with small batches."""
    positive_probability: float = Field(0.0, ge=0, lt=1)
    """How often a negative is in truth of the anchor's class, for which the sum is corrected (Chuang et al. 2020)."""
    hardness: float = Field(0.0, ge=0, le=1e4)
    """Weigh negatives by how similar they are, exp(hardness · similarity / temperature) (Robinson et al. 2021)."""
    score: Literal["cosine", "bilinear"] = "cosine"
    """Similarity of unit embeddings; or zᵀ W c of embeddings as they are, with a learned matrix W (CPC)."""

    @model_validator(mode="after")
    def _can_be_corrected(self) -> "InBatch":
        if self.score == "bilinear" and self.positive_probability:
            raise ValueError(
                f"positive_probability {self.positive_probability} and score=bilinear exclude each other: the "
                "corrected sum is kept above what the least possible score would give, and a bilinear score has none; "
                "set score=cosine or positive_probability=0"
            )
        if self.decoupled and self.positive_probability:
            raise ValueError(
                f"decoupled and positive_probability {self.positive_probability} exclude each other: the corrected sum "
                "may come near zero, where without the positive beside it its gradient has no bound; "
                "set decoupled=false or positive_probability=0"
            )
        return self

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every image of the batch against every other, each pair once, with no memory.

        That is on a CPU: a GPU computes a pair's products for both embeddings, twice as many. A bilinear score is not
        symmetric: each pair is then two, and the matrix has products of its own.
        """
        anchors, dim, sums = sizes.anchors, sizes.dim, 2 if self.hardness else 1
        if self.score == "bilinear":
            # In backward the sums' gradients go to all keys, whose own gradient stays.
            traffic = softmax_traffic(anchors, dim) + anchors * NUMBER
            products = sums * 4 * anchors * sizes.compared * dim + 3 * anchors * dim**2
        else:
            traffic, products = batch_softmax(sizes)
            products *= sums
        # Ids give the number of negatives.
        return sizes.cost(sizes.negatives, traffic=sums * traffic + sizes.batch * ID, products=products)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; its only state is the matrix of a bilinear score, an identity."""
        return InBatchObjective(self, dim=dim, keys=population.keys)


class InBatchObjective(Objective):
    """In-batch loss with, for a bilinear score, its matrix, equal on all ranks."""

    def __init__(self, settings: InBatch, *, dim: int, keys: int | None = None) -> None:
        super().__init__()
        self.options, self.keys = settings.model_dump(exclude={"name", "score"}), keys
        self.matrix = nn.Parameter(torch.eye(dim)) if settings.score == "bilinear" else None

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors against the embeddings of all ranks."""
        return nt_xent(embeddings, ids, matrix=self.matrix, keys=self.keys, **self.options)


@float32_island
def nt_xent(
    embeddings: Embeddings,
    ids: Ids,
    temperature: float,
    *,
    decoupled: bool = False,
    positive_probability: float = 0.0,
    hardness: float = 0.0,
    matrix: Float[Tensor, "dim dim"] | None = None,
    keys: int | None = None,
) -> Loss:
    """Normalised-temperature cross-entropy of each embedding against the whole batch.

    An anchor's positives are the other views of its image; with more than two views the loss is the mean over them.
    Its negatives are all embeddings of another id, on every rank: an image that comes twice is neither. The mean over
    anchors is the usual loss; SimCLR's own code returns twice that.

    The negatives enter the denominator as Σ exp(s/τ): weighted with `hardness`, corrected by `debiased` with
    `positive_probability`, without the positive beside them if `decoupled`. An anchor without negatives adds nothing.
    In each case the terms have the information bound of InfoNCE of the same scores, times 1 + hardness.

    With a `matrix` W the scores are those of contrastive predictive coding, f(z, c) = exp(zᵀ W c) (van den Oord et al.
    2018, equation 3): each embedding is once the context c. Embeddings keep their length. W is the matrix divided by
    the dimension and the temperature: with the identity, and embeddings of unit variance in each dimension, scores
    start on the scale of cosines.

    With `keys` only the first so many views are positives and negatives, of all views; the loss is the mean over all
    pairs of a view and another one that is a key (as Caron et al. 2020, SwAV, equation 6; vissl's SimCLR with several
    crops compares all with all).

    Raises:
        ValueError: if there is only one view.

    Examples:
        >>> z = torch.eye(3).expand(2, 3, 3)
        >>> nt_xent(z, torch.arange(3), temperature=0.5).total
        tensor(0.4327)
    """
    if matrix is None:
        queries = contexts = normalize(embeddings)
    else:
        contexts = at_least_float32(embeddings)
        queries = contexts @ matrix.T / len(matrix)
    views = len(queries)
    if views < 2:
        raise ValueError(
            f"an in-batch loss contrasts 2 views or more of each image, not {views}; set views.num_views=2"
        )
    if keys is not None:
        contexts = contexts[:keys]
    # Each ordered pair of views: [anchor's view, positive's view, image].
    positives = _off_diagonal(torch.einsum("vbd,wbd->vwb", queries, contexts))
    counts = (len(contexts) * other_images(ids)).to(positives.dtype)
    # Where positives are taken off the sum its gradient may nearly cancel.
    options = {"unit": matrix is None, "tf32_gradient": matrix is None and not positive_probability}
    compared = None if matrix is None and keys is None else contexts
    sums, negatives = (
        _of_pairs(part, len(contexts))
        for part in _negatives(queries, compared, ids, temperature, hardness, counts, **options)
    )
    logits = positives / temperature
    plain = cross_entropy(sums.detach(), (1 + hardness) * logits.detach())
    if positive_probability:
        negatives = debiased(negatives, logits, counts, positive_probability, temperature)
    if decoupled:
        losses = (negatives - logits).masked_fill(negatives.isneginf(), 0)
    else:
        losses = cross_entropy(negatives, logits)
    cosines = positives.detach()
    if matrix is not None:
        unit = normalize(embeddings.detach())
        cosines = _off_diagonal(torch.einsum("vbd,wbd->vwb", unit, unit[:keys]))
    terms = {"positive_similarity": cosines.mean(), "negatives": counts.mean()}
    if keys is None:
        losses, plain = (part.unflatten(0, (views, -1)).mean(1) for part in (losses, plain))
    terms |= information(plain.flatten(), 1 + counts.repeat(len(plain)))
    return Loss(average(losses.flatten()), terms)


def debiased(
    negatives: Float[Tensor, "*pairs batch"],
    positives: Float[Tensor, "*pairs batch"],
    counts: Float[Tensor, " batch"],
    positive_probability: float,
    temperature: float,
) -> Float[Tensor, "*pairs batch"]:
    """Log of the sum over true negatives (Chuang et al. 2020, equation 8).

    Of N negatives a share τ⁺ is expected to be positives, each like the positive at hand: what remains is
    (Σ − τ⁺ N e^p) / (1 − τ⁺), at least N e^(−1/τ), the minimum of a sum over N. Where that bound is active, the
    gradient is zero, as in the authors' code; unlike theirs, nothing is exponentiated.

    `negatives` are log Σ for each pair of an anchor and a positive, `positives` the logits p of the positives, `counts`
    N, `positive_probability` τ⁺, in (0, 1).
    """
    counts = counts.log()
    excess = positives + (counts + math.log(positive_probability)) - negatives
    left = excess < 0
    # Both branches of a `where` have a gradient: the one not taken must be finite.
    rest = negatives + torch.log(-torch.expm1(excess.where(left, -1))) - math.log1p(-positive_probability)
    least = (counts - 1 / temperature).expand_as(rest)
    return rest.where(left & (rest > least), least)


def other_images(ids: Ids) -> Int[Tensor, " batch"]:
    """Number of images in the batches of all ranks that have another id than each image."""
    ordered = distributed.gather_without_gradient(ids).sort().values
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return len(ordered) - equal


def _off_diagonal(matrix: Float[Tensor, "views keys batch"]) -> Float[Tensor, "pairs batch"]:
    """Pairs of a view and another one that is a key, view by view."""
    _, keys, batch = matrix.shape
    # Without its first element the square is rows of one element more, the last of which is on the diagonal.
    rest = matrix[:keys].reshape(keys * keys, batch)[1:].view(keys - 1, keys + 1, batch)
    return torch.cat([rest[:, :-1].flatten(0, 1), matrix[keys:].flatten(0, 1)])


def _of_pairs(values: Float[Tensor, "views batch"], keys: int) -> Float[Tensor, "pairs batch"]:
    """Repeats the anchors' values for their pairs, in the order of `_off_diagonal`."""
    parts = (values[:keys], keys - 1), (values[keys:], keys)
    return torch.cat([part.unsqueeze(1).expand(-1, count, -1).flatten(0, 1) for part, count in parts])


def _negatives(
    queries: Tensor,
    keys: Tensor | None,  # the queries
    ids: Tensor,
    temperature: float,
    hardness: float,
    counts: Tensor,
    **options: bool,
) -> tuple[Float[Tensor, "views batch"], Float[Tensor, "views batch"]]:
    """Log-sum-exp of (1 + β) s/τ over each anchor's negatives, and the log of their new sum.

    Without hardness (β = 0) that is the same, else N times their weighted mean. The weights e^(βs/τ) multiply the terms
    e^(s/τ) and are normalised by their own sum; the gradient passes through both, as in the authors' code.
    """
    views, batch, _ = queries.shape
    anchors, anchor_ids = queries.flatten(0, 1), ids.repeat(views)
    others, other_ids = (None, None) if keys is None else (keys.flatten(0, 1), ids.repeat(len(keys)))

    def logarithms(temperature: float) -> Tensor:
        sums = log_sum_exp(anchors, others, temperature, query_ids=anchor_ids, key_ids=other_ids, **options)
        return sums.view(views, batch)

    sums = logarithms(temperature / (1 + hardness))
    if not hardness:
        return sums, sums
    return sums, (sums - logarithms(temperature / hardness) + counts.log()).where(counts > 0, -torch.inf)
