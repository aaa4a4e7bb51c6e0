import math

import pytest
import torch
from torch import Tensor

from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.k_means import k_means
from manyviews.evaluators.retrieval import RetrievalResult, RetrievalSettings, retrieve

GRID = RetrievalSettings(recall_at=(1, 3, 16), ndcg_at=(1, 10))


def clusters(num: int, classes: int, *, noise: float = 2.0, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    # Classes of very different sizes, the last with a single image.
    labels = (torch.rand(num, generator=generator).square() * (classes - 1)).long()
    labels[num // 2] = classes - 1
    features = centres[labels] + noise * torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return features, labels


def oracle(
    queries: Tensor,
    query_labels: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    query_ids: list[int],
    reference_ids: list[int],
    nearness: str = "cosine",
) -> dict[int, list[float]]:
    """By query: Recall@1, @3, @16, R-precision, MAP@R, NDCG@1, @10; a loop over pairs, from the definitions."""
    figures = {}
    for number, query in enumerate(queries):
        if query_labels[number] < 0:
            continue
        actual = []
        for index, row in enumerate(references):
            if reference_labels[index] < 0 or reference_ids[index] == query_ids[number]:
                continue
            cosine = float(query @ row / query.norm() / row.norm())
            near = cosine if nearness == "cosine" else -float((query - row).square().sum())
            actual.append((-near, index))
        hits = [bool(reference_labels[index] == query_labels[number]) for _, index in sorted(actual)]
        relevant = sum(hits)
        if not relevant:
            continue
        recalls = [float(any(hits[:k])) for k in (1, 3, 16)]
        average = sum(hits[i] * sum(hits[: i + 1]) / (i + 1) for i in range(relevant)) / relevant
        ndcg = []
        for k in (1, 10):
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, relevant) + 1))
            ndcg.append(sum(hit / math.log2(rank + 1) for rank, hit in enumerate(hits[:k], 1)) / ideal)
        figures[number] = [*recalls, sum(hits[:relevant]) / relevant, average, *ndcg]
    return figures


def rows_of(result: RetrievalResult) -> dict[int, list[float]]:
    columns = torch.cat([result.recall.double(), result.r_precision[None], result.map_at_r[None], result.ndcg])
    return dict(zip(result.queries.tolist(), columns.T.tolist(), strict=True))


def assert_equal(result: RetrievalResult, expected: dict[int, list[float]]) -> None:
    actual = rows_of(result)
    assert list(actual) == list(expected)
    for query, figures in expected.items():
        assert actual[query] == pytest.approx(figures, rel=1e-12)


@pytest.mark.parametrize("nearness", ["cosine", "euclidean"])
def test_every_figure_of_every_query_equals_a_double_loop(nearness):
    features, labels = clusters(90, 5)
    labels[::11] = -1
    ids = list(range(90))
    expected = oracle(features, labels, features, labels, ids, ids, nearness)
    result = retrieve(features, labels, settings=GRID, nearness=nearness)
    assert_equal(result, expected)
    assert result.left_out == int((labels >= 0).sum()) - len(expected) == 1


@pytest.mark.parametrize("nearness", ["cosine", "euclidean"])
def test_separate_queries_and_references_share_images_by_id_alone(nearness):
    references, reference_labels = clusters(70, 4, seed=1)
    queries, query_labels = clusters(30, 4, seed=2)
    query_labels[3] = 7
    # Ids that are sparse, out of order and repeated on both sides.
    reference_ids, query_ids = (torch.arange(70) * 37) % 50, (torch.arange(30) * 11) % 60
    both = queries, query_labels, references, reference_labels
    expected = oracle(*both, query_ids.tolist(), reference_ids.tolist(), nearness)
    ids = {"query_ids": query_ids, "reference_ids": reference_ids}
    result = retrieve(*both, **ids, settings=GRID, nearness=nearness)
    assert_equal(result, expected)
    assert 3 not in result.queries.tolist()
    free = retrieve(*both, settings=GRID, nearness=nearness)
    assert_equal(free, oracle(*both, list(range(30)), list(range(100, 170)), nearness))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("nearness", ["cosine", "euclidean"])
def test_blocks_of_any_size_give_the_same_result(block, nearness, monkeypatch):
    features, labels = clusters(150, 6)
    whole = retrieve(features, labels, settings=GRID, nearness=nearness)
    monkeypatch.setattr("manyviews.evaluators.retrieval.HITS", 150 * block)
    for one, two in zip(whole, retrieve(features, labels, settings=GRID, nearness=nearness), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-12, atol=0)


def test_a_ranking_written_down_by_hand():
    # On a line of angles: the query 0 of class 0 finds 1, 0, 0, 1 and then its last of class 0.
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    features, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 0, 1, 0])
    first = rows_of(retrieve(features, labels, settings=GRID))[0]
    gains = 1 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(6)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert first == pytest.approx([0, 1, 1, 2 / 3, (1 / 2 + 2 / 3) / 3, 0, gains / ideal], rel=1e-12)


def test_classes_far_apart_score_one_and_worst_orders_score_zero():
    labels = torch.arange(40) % 4
    features = torch.eye(4)[labels] + 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    for figures in rows_of(retrieve(features, labels, settings=GRID)).values():
        assert figures == [1, 1, 1, 1, 1, 1, pytest.approx(1)]
    # Two images of each class, at opposite ends.
    angles = torch.linspace(0, 1, 6)
    result = retrieve(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 2, 2, 1, 0]))
    assert result.map_at_r[0] == result.r_precision[5] == 0
    assert not result.recall[:3, 0].any()
    assert result.recall[3, 0]


def test_a_duplicate_is_found_and_the_image_itself_is_not():
    features, labels = clusters(60, 3, noise=5.0)
    # Each image twice: the copy, another id, is the nearest of all.
    doubled = retrieve(features.repeat(2, 1), labels.repeat(2))
    assert doubled.recall.all()
    assert doubled.left_out == 0
    # A copy of another class is found first as well.
    assert not retrieve(features.repeat(2, 1), torch.cat([labels, labels + 3])).recall[0].any()
    # The same image under one id on both sides does not find itself nor its copies.
    ids = torch.arange(60).repeat(2)
    both = {"query_ids": ids, "reference_ids": ids}
    hidden = retrieve(features.repeat(2, 1), labels.repeat(2), features.repeat(2, 1), labels.repeat(2), **both)
    once = retrieve(features, labels)
    assert torch.equal(hidden.recall[0, : len(once.queries)], once.recall[0])


def test_equal_features_are_ranked_by_index():
    labels = torch.tensor([0, 1, 0, 1, 0])
    result = retrieve(torch.ones(5, 3), labels, settings=GRID)
    ids = list(range(5))
    assert_equal(result, oracle(torch.ones(5, 3).double(), labels, torch.ones(5, 3).double(), labels, ids, ids))


def test_the_euclidean_order_holds_far_from_the_origin_in_float32():
    features, labels = clusters(200, 4)
    near = retrieve(features, labels, settings=GRID, nearness="euclidean")
    far = retrieve((features + 300).float(), labels, settings=GRID, nearness="euclidean")
    torch.testing.assert_close(near.map_at_r, far.map_at_r, rtol=0, atol=1e-3)
    scaled = retrieve(features * 1e-4, labels, settings=GRID, nearness="euclidean")
    torch.testing.assert_close(near.map_at_r, scaled.map_at_r, rtol=1e-12, atol=0)


def test_the_means_are_those_of_pytorch_metric_learning():
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    features, labels = clusters(300, 6)
    features = features.float()
    calculator = calculators.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        # Its default searches by Euclidean distance, which is another order than the cosine's.
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
        # It takes the first neighbour for the image itself: the same, as no two images are equal here.
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(features, labels)
    ours = retrieve(features, labels)
    # Both leave out the image that is alone in its class.
    assert ours.left_out == 1
    assert ours.recall[0].double().mean().item() == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours.r_precision.mean().item() == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours.map_at_r.mean().item() == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_its_clusters_are_scored_by_pytorch_metric_learning_as_by_ours():
    pytest.importorskip("faiss")  # without it, its scores are not to be had
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    features, labels = clusters(300, 6, noise=1.0)
    calculator = calculators.AccuracyCalculator(
        include=("NMI", "AMI"),
        kmeans_func=lambda x, number: k_means(torch.nn.functional.normalize(x, dim=1), number),
        device=torch.device("cpu"),
    )
    theirs, ours = calculator.get_accuracy(features, labels), clustering(features, labels)
    assert (ours.nmi, ours.ami) == pytest.approx((theirs["NMI"], theirs["AMI"]), abs=1e-6)


def test_ndcg_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    features, labels = clusters(120, 5)
    result = retrieve(features, labels, settings=RetrievalSettings(recall_at=(1,), ndcg_at=(10, 50)))
    unit = torch.nn.functional.normalize(features, dim=1)
    for place, query in enumerate(result.queries.tolist()):
        others = torch.arange(120) != query
        truth = (labels[others] == labels[query]).double()[None]
        for row, k in enumerate((10, 50)):
            theirs = metrics.ndcg_score(truth, (unit[query] @ unit[others].T)[None], k=k)
            assert result.ndcg[row, place].item() == pytest.approx(theirs, rel=1e-12)


def test_what_cannot_be_retrieved_is_refused_in_words():
    features, labels = clusters(20, 3)
    with pytest.raises(ValueError, match="none of 20 queries has another image of its class"):
        retrieve(features, torch.arange(20))
    with pytest.raises(ValueError, match="find itself"):
        retrieve(features, labels, features.clone(), labels)
    with pytest.raises(ValueError, match="one side only"):
        retrieve(features, labels, features, labels, query_ids=torch.arange(20))
    with pytest.raises(ValueError, match="one side only"):
        retrieve(features, labels, features)
