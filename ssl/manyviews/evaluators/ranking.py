"""Ranking: gains and rank correlations of the images around a query, by graded relevance."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import sample_ids
from manyviews.data.labels import ValuesSource
from manyviews.evaluators.distance import Nearness, similarity_of_pairs
from manyviews.evaluators.gains import Gain, gains_at
from manyviews.evaluators.rank_correlation import kendall_tau, spearman_rho
from manyviews.evaluators.relevance import Graded, Lists, RankedQuery, RankingExamples, Relevance, Triplets
from manyviews.evaluators.results.intervals import bootstrap_means, wilson
from manyviews.evaluators.results.measurement import Difference, Measurement, is_learned
from manyviews.system.names import did_you_mean

RIGHT_ORDER = "right order"
"""The metric of triplets."""
EXAMPLES, LENGTH = 4, 8
"""Worst and best queries that are shown, and items of each."""


def _distinct(ks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ks))


def _source(by: str) -> str:
    if by == "class":
        return by
    try:
        return TypeAdapter[str](ValuesSource).validate_python(by)
    except ValidationError:
        known = ("class", "pixels", "labels")
        raise ValueError(
            f"by={by} is neither class, pixels nor labels nor the path of a .npy or .csv file"
            f"{did_you_mean(by, known, cutoff=0.5)}"
        ) from None


class RankingSettings(Settings):
    """What is relevant to a query, and how its ranking is judged."""

    by: Annotated[str, AfterValidator(_source)] | None = None
    """What makes an image relevant to a query: class (1 if it has the query's class, else 0), or the distance d of
    continuous labels, as 1 / (1 + d): pixels, labels, or a file of numbers, as the recipe's values. Null: the run's
    values if it has any, else class; with relations=FILE the file alone decides."""
    k: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], AfterValidator(_distinct)] = Field(
        (10,), min_length=1, max_length=64
    )
    """Numbers of nearest images of NDCG, CG, DCG and IDCG; NDCG at the first is what rankings are compared by."""
    gain: Gain = "linear"
    """Gain of an image of relevance r: linear, r; exponential, 2^r − 1 (Burges et al. 2005), for relevances such as 0
    to 4."""
    queries: int = Field(1_000, ge=1, le=10_000_000)
    """Number of images, drawn at random, that all others are ranked for."""


class RankingOutcome(NamedTuple):
    """The measurements of one kind of features, and what they are means of."""

    measurements: tuple[Measurement, ...]
    queries: Int64[Tensor, " counted"] | None = None
    """Ids of the queries; None for triplets."""
    values: Float64[Tensor, " counted"] | None = None
    """The leading figure of each query."""
    right: Bool[Tensor, " triplets"] | None = None
    """Whether each triplet is in the right order."""
    examples: RankingExamples | None = None


class RankingResult(NamedTuple):
    """Figures of each query whose items differ in relevance; their means are reported."""

    queries: Int64[Tensor, " counted"]
    """Ids of these queries."""
    left_out: int
    """Number of queries whose items are all equally relevant, for which there is no right order."""
    figures: Mapping[str, Float64[Tensor, " counted"]]
    """By name: NDCG, CG, DCG and IDCG at each k, Kendall's τ-b and Spearman's ρ of the whole ranking."""
    items: int
    """The most items of a query."""
    examples: RankingExamples


def measure_ranking(
    kind: str,
    features: Float[Tensor, "images dim"],
    relevance: Relevance,
    settings: RankingSettings,
    *,
    nearness: Nearness,
    distance: str,
    seed: int,
) -> RankingOutcome:
    """Measures the rankings of one kind of features: means over queries with bootstrap intervals.

    Of triplets it is the share in the right order, with its interval.

    Raises:
        ValueError: as `rank_items` does.
    """
    rows: list[tuple[str, float, float, float]]
    details: dict[str, Any] = {"by": relevance.by}
    if isinstance(relevance, Triplets):
        outcome = RankingOutcome((), right=right_order(features, relevance, nearness=nearness))
        assert outcome.right is not None
        n, count = len(outcome.right), int(outcome.right.sum())
        rows, details["leading"] = [(RIGHT_ORDER, count / n, *wilson(count, n))], RIGHT_ORDER
    else:
        result = rank_items(features, relevance, settings, nearness=nearness, seed=seed)
        leading, n = result.examples.figure, len(result.queries)
        outcome = RankingOutcome((), result.queries, result.figures[leading], examples=result.examples)
        details |= {"leading": leading, "left_out": result.left_out, "items": result.items, "gain": settings.gain}
        ends = bootstrap_means(torch.stack([*result.figures.values()], 1), seed=seed)
        rows = [
            (name, values.mean().item(), *interval)
            for (name, values), interval in zip(result.figures.items(), ends, strict=True)
        ]
    about: dict[str, Any] = {"n": n, "dim": features.shape[1], "distance": distance, "details": details}
    return outcome._replace(measurements=tuple(Measurement("ranking", kind, *row, **about) for row in rows))


def leads_of_rankings(
    values: Mapping[str, Float[Tensor, " images"]], kinds: Sequence[str], *, seed: int
) -> list[Difference]:
    """Returns the lead of the first kind over each other one, with its paired bootstrap interval.

    `values` are the leading figures of the queries, by "ranking/learned" and so on; NaN for other images.
    """
    leads = []
    for other in sorted(kinds[1:], key=is_learned):
        own, others = (values.get(f"ranking/{kind}") for kind in (kinds[0], other))
        if own is not None and others is not None:
            gaps = (own - others).double()
            gaps = gaps[gaps.isfinite()]
            ((low, high),) = bootstrap_means(gaps[:, None], seed=seed)
            leads.append(Difference(kinds[0], other, "ranking", gaps.mean().item(), low, high))
    return leads


@torch.no_grad()
def rank_items(
    features: Float[Tensor, "images dim"],
    relevance: Graded | Lists,
    settings: RankingSettings | None = None,
    *,
    nearness: Nearness = "cosine",
    seed: int = 0,
) -> RankingResult:
    """Ranks the items of each query by similarity of features, and judges it by their relevance.

    Items of equal similarity share their mean gain (`gains`). Features that are all equal rank nothing: their
    correlations count as 0. Queries are ranked block by block; no table of all queries and items is stored.
    Similarities are computed where the features are, all else on the CPU.

    Raises:
        ValueError: if no query has items of different relevance, or a relevance is negative or too large for its gain.

    Examples:
        >>> from manyviews.evaluators.relevance import same_class
        >>> points, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
        >>> result = rank_items(points, same_class(labels, torch.arange(4)), RankingSettings(k=(1,)))
        >>> result.figures["NDCG@1"].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    settings = settings or RankingSettings()
    chosen = sample_ids(len(relevance.images), settings.queries, seed=seed)
    positions: list[Tensor] = []
    figures: dict[str, list[Tensor]] = {}
    most = 0
    for block in relevance.blocks(features, chosen, nearness):
        asked = block.relevances.amax(1) > block.relevances.amin(1)
        relevances, scores = block.relevances[asked], block.scores[asked]
        if not len(scores):
            continue
        own = gains_at(relevances, scores, settings.k, gain=settings.gain)
        own |= {"Kendall τ-b": kendall_tau(relevances, scores), "Spearman ρ": spearman_rho(relevances, scores)}
        positions.append(block.positions[asked])
        most = max(most, scores.shape[1])
        for name, values in own.items():
            figures.setdefault(name, []).append(values.nan_to_num(0))
    if not positions:
        raise ValueError(
            f"none of {len(chosen):,} queries has items of different relevance ({relevance.by}), so no order is better "
            "than another"
        )
    counted, order = torch.cat(positions).sort()
    whole = {name: torch.cat(values)[order] for name, values in figures.items()}
    leading = f"NDCG@{settings.k[0]}"
    lead = whole[leading]
    by_value = lead.argsort(stable=True)
    few = by_value[:EXAMPLES], by_value[EXAMPLES:].flip(0)[:EXAMPLES]
    worst, best = (_examples(features, relevance, counted[rows], lead[rows], nearness) for rows in few)
    examples = RankingExamples(worst, best, relevance.by, leading)
    return RankingResult(relevance.images[counted], len(chosen) - len(counted), whole, most, examples)


@torch.no_grad()
def right_order(
    features: Float[Tensor, "images dim"], triplets: Triplets, *, nearness: Nearness = "cosine"
) -> Bool[Tensor, " triplets"]:
    """Returns whether the anchor is more similar to the positive than to the negative.

    Equal similarities are not in the right order.

    Examples:
        >>> right_order(torch.eye(2)[[0, 0, 1]], Triplets(torch.tensor([[0, 1, 2], [0, 2, 1]]), "file")).tolist()
        [True, False]
    """
    images = triplets.images.to(features.device)
    near, far = (similarity_of_pairs(features, images[:, [0, other]], nearness) for other in (1, 2))
    return (near > far).cpu()


def _examples(
    features: Tensor, relevance: Graded | Lists, positions: Tensor, values: Tensor, nearness: Nearness
) -> tuple[RankedQuery, ...]:
    """Some queries with their first items, in the order given."""
    shown: dict[int, RankedQuery] = {}
    by_position = dict(zip(positions.tolist(), values.tolist(), strict=True))
    for block in relevance.blocks(features, positions, nearness):
        for row, position in enumerate(block.positions.tolist()):
            orders = [
                numbers[row].argsort(descending=True, stable=True)[:LENGTH]
                for numbers in (block.scores, block.relevances)
            ]
            ranked, ideal = (
                tuple(zip(block.items[row, order].tolist(), block.relevances[row, order].tolist(), strict=True))
                for order in orders
            )
            query = int(relevance.images[position])
            shown[position] = RankedQuery(query, by_position[position], ranked, ideal)
    return tuple(shown[position] for position in positions.tolist())
