"""Rankings of images around a query against loops in float64, scikit-learn and scipy."""

import math

import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import dcg_score, ndcg_score
from torch import Tensor
from torch.nn.functional import cosine_similarity

from manyviews.evaluators import relevance as module
from manyviews.evaluators.ranking import RankingSettings, rank_items, right_order
from manyviews.evaluators.relevance import Graded, Lists, Triplets, near_values, same_class
from manyviews.evaluators.results.intervals import bootstrap_means

ALL = RankingSettings(k=(3, 1, 500), queries=100)


def images(count: int = 24, *, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Features, of which some are equal with ties, classes and continuous labels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (count,), generator=generator)
    values = torch.randn(count, 2, generator=generator).round() + labels[:, None]
    features = torch.randn(count, 4, generator=generator) + values @ torch.randn(2, 4, generator=generator)
    return (features.round() if ties else features), labels, values


def by_hand(features: Tensor, query: int, items: list[int], relevances: list[float], gain: str) -> dict[str, float]:
    """The figures of one query by scikit-learn and scipy."""
    scores = cosine_similarity(features[query].double(), features[items].double(), dim=1).numpy()[None]
    gains = [[value if gain == "linear" else 2**value - 1 for value in relevances]]
    figures = {
        "Kendall τ-b": float(kendalltau(scores[0], relevances).statistic),
        "Spearman ρ": float(spearmanr(scores[0], relevances).statistic),
    }
    for k in ALL.k:
        first = sorted(gains[0], reverse=True)[:k]
        figures |= {
            f"NDCG@{k}": float(ndcg_score(gains, scores, k=k)),
            f"DCG@{k}": float(dcg_score(gains, scores, k=k)),
            f"IDCG@{k}": sum(own / math.log2(rank + 2) for rank, own in enumerate(first)),
        }
    return figures


def check(features: Tensor, relevance: Graded | Lists, expected: dict[int, dict[str, float]], **settings: str) -> None:
    result = rank_items(features, relevance, ALL.model_copy(update=settings))
    assert sorted(result.queries.tolist()) == sorted(expected)
    for name in next(iter(expected.values())):
        actual = result.figures[name].tolist()
        assert actual == pytest.approx([expected[query][name] for query in result.queries.tolist()], rel=1e-5), name


@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_by_class_and_by_values_every_figure_is_that_of_scikit_learn_and_scipy(gain: str) -> None:
    features, labels, values = images()
    graded, binary = near_values(values, torch.arange(24), "x"), same_class(labels, torch.arange(24))
    by_grade, by_class = {}, {}
    for query in range(24):
        items = [item for item in range(24) if item != query]
        distances = [(values[item] - values[query]).double().norm().item() for item in items]
        by_grade[query] = by_hand(features, query, items, [1 / (1 + distance) for distance in distances], gain)
        by_class[query] = by_hand(features, query, items, [float(labels[i] == labels[query]) for i in items], gain)
    check(features, graded, by_grade, gain=gain)
    check(features, binary, by_class, gain=gain)


def test_in_lists_only_the_items_of_a_query_are_ranked() -> None:
    features, _, _ = images()
    listed = {5: {1: 2.0, 2: 0.0, 9: 1.0}, 2: {3: 1.0, 4: 0.0}, 7: {8: 3.0, 0: 3.5, 6: 0.0}, 9: {1: 1.0, 2: 1.0}}
    items = [(item, value) for own in listed.values() for item, value in own.items()]
    lists = Lists(
        torch.tensor(list(listed)),
        torch.tensor([len(own) for own in listed.values()]),
        torch.tensor([item for item, _ in items]),
        torch.tensor([value for _, value in items], dtype=torch.float64),
        "file",
    )
    # The items of image 9 are equally relevant.
    expected = {
        query: by_hand(features, query, list(own), list(own.values()), "linear")
        for query, own in listed.items()
        if query != 9
    }
    check(features, lists, expected)
    assert rank_items(features, lists, ALL).left_out == 1


def test_cumulative_gain_by_class_counts_the_nearest_of_the_class() -> None:
    features, labels, _ = images()
    result = rank_items(features, same_class(labels, torch.arange(24)), ALL)
    for query, counted in zip(result.queries.tolist(), result.figures["CG@3"].tolist(), strict=True):
        cosines = cosine_similarity(features[query], features, dim=1)
        cosines[query] = -2
        assert counted == int((labels[cosines.topk(3).indices] == labels[query]).sum())


def test_images_with_equal_features_share_their_mean_gain() -> None:
    features, labels = torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 1, 1])
    result = rank_items(features, same_class(labels, torch.arange(4)), RankingSettings(k=(1,)))
    # Images 1 and 2 coincide with image 0, one of them of its class; all others are equally far from image 3.
    assert result.figures["NDCG@1"].tolist() == pytest.approx([1 / 2, 1 / 2, 0, 1 / 3])
    collapsed = rank_items(torch.ones(4, 3), same_class(labels, torch.arange(4)), RankingSettings(k=(1,)))
    assert collapsed.figures["NDCG@1"].tolist() == pytest.approx([1 / 3] * 4)
    assert collapsed.figures["Kendall τ-b"].tolist() == [0] * 4


def test_blocks_of_any_size_have_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _, values = images()
    graded = near_values(values, torch.arange(24), "x")
    whole = rank_items(features, graded, ALL)
    monkeypatch.setattr(module, "TABLE", 50)
    assert [len(block.scores) for block in graded.blocks(features, torch.arange(5), "cosine")] == [2, 2, 1]
    parts = rank_items(features, graded, ALL)
    for name, expected in whole.figures.items():
        torch.testing.assert_close(parts.figures[name], expected, rtol=1e-6, atol=1e-9)
    assert [own.query for own in parts.examples.worst] == [own.query for own in whole.examples.worst]


def test_distances_rank_by_length_too_and_unlabelled_images_take_no_part() -> None:
    features, labels = torch.tensor([[1.0], [1.1], [5.0], [5.2], [5.1]]), torch.tensor([0, 0, 1, 1, -1])
    relevance, first = same_class(labels, torch.arange(5)), RankingSettings(k=(1,))
    near = rank_items(features, relevance, first, nearness="euclidean")
    assert near.queries.tolist() == [0, 1, 2, 3]
    assert near.figures["NDCG@1"].tolist() == [1] * 4
    assert rank_items(features, relevance, first).figures["NDCG@1"].mean() < 1


def test_the_worst_and_best_queries_show_what_is_nearest_and_what_should_be() -> None:
    features, _, values = images(60)
    graded = near_values(values, torch.arange(60), "x")
    result = rank_items(features, graded, RankingSettings(k=(10,), queries=50))
    ordered = result.figures["NDCG@10"].sort().values.tolist()
    assert [own.value for own in result.examples.worst] == ordered[:4]
    assert [own.value for own in result.examples.best] == ordered[:-5:-1]
    own = result.examples.worst[0]
    cosines = cosine_similarity(features[own.query], features, dim=1)
    assert [item for item, _ in own.ranked] == cosines.argsort(descending=True)[1:9].tolist()
    distances = (values - values[own.query]).norm(dim=1)
    assert [relevance for _, relevance in own.ideal] == pytest.approx((1 / (1 + distances.sort().values))[1:9].tolist())


def test_a_sample_of_queries_depends_on_the_seed_alone() -> None:
    features, labels, _ = images()
    relevance, few = same_class(labels, torch.arange(24)), RankingSettings(queries=5)
    one, two, other = (rank_items(features, relevance, few, seed=seed).queries.tolist() for seed in (0, 0, 1))
    assert len(one) == 5
    assert one == two != other


def test_queries_whose_items_are_all_alike_are_refused() -> None:
    features, _, _ = images()
    with pytest.raises(ValueError, match="none of 24 queries has items of different relevance"):
        rank_items(features, same_class(torch.zeros(24).long(), torch.arange(24)), ALL)
    with pytest.raises(ValueError, match="none of 1 queries"):
        rank_items(features, near_values(torch.ones(24, 1), torch.arange(1), "x"), ALL)


def test_triplets_are_in_the_right_order_if_the_positive_is_nearer_by_a_loop() -> None:
    features, _, _ = images()
    triplets = torch.randint(24, (200, 3), generator=torch.Generator().manual_seed(0))
    actual = right_order(features, Triplets(triplets, "file"), nearness="euclidean").tolist()
    rows = features.double()
    expected = [bool((rows[a] - rows[p]).norm() < (rows[a] - rows[n]).norm()) for a, p, n in triplets.tolist()]
    assert actual == expected
    assert not right_order(torch.ones(3, 2), Triplets(torch.tensor([[0, 1, 2]]), "file")).any()


def test_the_interval_of_a_mean_is_near_that_by_its_standard_error_and_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(300, 150, generator=generator)
    intervals = bootstrap_means(drawn[0][:, None], seed=0)
    reach = 1.96 * drawn[0].std().item() / 150**0.5
    assert intervals[0] == pytest.approx((drawn[0].mean().item() - reach, drawn[0].mean().item() + reach), abs=0.006)
    held = [low <= 0.5 <= high for own in drawn for low, high in bootstrap_means(own[:, None], seed=1, resamples=400)]
    assert 0.91 <= sum(held) / len(held) <= 0.98
