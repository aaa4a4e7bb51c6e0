"""kNN and the probe, retrieval, clustering, verification and fitted metrics on every kind of features."""

import json

import pytest
import torch
from torch import Tensor

from manyviews.evaluators.compare import compare
from manyviews.evaluators.distance import Cosine, Euclidean
from manyviews.evaluators.knn import KnnSettings
from manyviews.evaluators.linear import LinearSettings
from manyviews.evaluators.protocol import Gallery, ProtocolSettings, takes_training
from manyviews.evaluators.results.intervals import mean_interval, paired_difference, wilson
from manyviews.evaluators.results.measurement import Evaluation
from manyviews.evaluators.results.tables import sheets
from manyviews.evaluators.retrieval import RetrievalSettings, retrieve
from manyviews.evaluators.splits import hold_out
from manyviews.evaluators.verification import VerificationSettings, draw_pairs, verify
from manyviews.linear_metrics import LinearMetric, Mahalanobis
from recorded import printed_text

PROTOCOL = ProtocolSettings(
    knn=KnnSettings(neighbours=(1, 10), temperatures=(0.07,)),
    linear=LinearSettings(regularisations=(0.1,)),
    verification=VerificationSettings(pairs=400, folds=4),
)
PROBES = ProtocolSettings(
    knn=KnnSettings(neighbours=(1, 10, 50), temperatures=(0.07, 0.3)),
    linear=LinearSettings(regularisations=(1e-3, 0.1, 10.0)),
)
UNSEEN = (3, 4)
Kinds = dict[str, tuple[Tensor | None, Tensor]]


def kinds(noise: dict[str, float], *, nuisance: float = 0.0, dim: int = 8) -> tuple[Kinds, Tensor, Tensor]:
    """Classes around centres; with a nuisance, numbers that vary much and say nothing."""
    generator = torch.Generator().manual_seed(0)
    train_labels, test_labels = torch.arange(600) % 5, torch.arange(300) % 5
    centres = torch.randn(5, dim, generator=generator)

    def draw(labels: Tensor, amount: float) -> Tensor:
        images = centres[labels] + amount * torch.randn(len(labels), dim, generator=generator)
        return torch.cat([images, nuisance * torch.randn(len(labels), 3, generator=generator)], 1)

    return (
        {kind: (draw(train_labels, amount), draw(test_labels, amount)) for kind, amount in noise.items()},
        train_labels,
        test_labels,
    )


@pytest.fixture(scope="module")
def inputs() -> tuple[Kinds, Tensor, Tensor]:
    return kinds({"learned": 0.5, "random weights": 3.0})


def gallery_of(train_labels: Tensor, test_labels: Tensor, classes: tuple[int, ...] = UNSEEN) -> Gallery:
    chosen = torch.tensor(classes)
    return Gallery(
        torch.isin(test_labels, chosen).nonzero().squeeze(1),
        "never seen in training",
        (~torch.isin(train_labels, chosen)).nonzero().squeeze(1),
    )


@pytest.fixture(scope="module")
def evaluation(inputs) -> Evaluation:
    features, *labels = inputs
    tasks = ("knn", "linear", "retrieval", "clustering", "verification")
    return compare(features, *labels, PROTOCOL, tasks=tasks, gallery=gallery_of(*labels))


def test_figures_are_those_of_the_gallery_alone(inputs, evaluation):
    features, _, test_labels = inputs
    images = torch.isin(test_labels, torch.tensor(UNSEEN))
    measured = {(own.task, own.features, own.metric): own for own in evaluation.measurements}
    assert len({key[:2] for key in measured}) == 10
    for kind, (_, test) in features.items():
        result = retrieve(test[images], test_labels[images])
        actual = measured["retrieval", kind, "MAP@R"]
        assert (actual.n, actual.details) == (120, {"left_out": 0})
        assert actual.value == pytest.approx(result.map_at_r.mean().item())
        assert (actual.low, actual.high) == mean_interval(result.map_at_r)
        recall = measured["retrieval", kind, "Recall@4"].value
        assert recall == pytest.approx(result.recall[2].double().mean().item())
        pairs = draw_pairs(test_labels[images], PROTOCOL.verification)
        judged = verify(test[images], pairs, PROTOCOL.verification)
        assert measured["verification", kind, "accuracy"].value == pytest.approx(judged.accuracy)


def test_the_verdict_covers_retrieval_and_verification_on_the_same_queries_and_pairs(inputs, evaluation):
    features, _, test_labels = inputs
    assert [difference.task for difference in evaluation.differences] == [
        "knn",
        "linear",
        "retrieval",
        "verification",
    ]
    images = torch.isin(test_labels, torch.tensor(UNSEEN))
    first, second = (retrieve(test[images], test_labels[images]).recall[0] for _, test in features.values())
    retrieval = evaluation.differences[2]
    assert (retrieval.difference, retrieval.low, retrieval.high) == paired_difference(first, second)
    assert evaluation.verdict().startswith("Ahead of every baseline: by kNN, ")
    assert "; by Recall@1, learned features beat random weights by " in evaluation.verdict()


def test_a_loss_in_retrieval_alone_is_no_win(inputs):
    features, *labels = inputs
    train, test = features["learned"]
    worse = test.clone()
    of_gallery = torch.isin(labels[1], torch.tensor(UNSEEN))
    worse[of_gallery] = features["random weights"][1][of_gallery]
    options = {"tasks": ("knn", "retrieval"), "gallery": gallery_of(*labels)}
    turned = compare({"learned": (train, worse), "raw pixels": (train, test)}, *labels, PROTOCOL, **options)
    assert not turned.verdict().startswith("Ahead")
    assert "by Recall@1, learned features fall behind raw pixels" in turned.verdict()


def test_clustering_alone_claims_nothing(inputs):
    features, *labels = inputs
    clustered = compare(features, *labels, PROTOCOL, tasks=("clustering",))
    assert clustered.differences == ()
    assert "no ranking is claimed" in clustered.verdict()
    alone = compare({"learned": features["learned"]}, *labels, PROTOCOL, tasks=("clustering",))
    assert alone.verdict() == "There is no baseline to compare with."


def test_the_record_is_json_and_the_tables_fit_a_narrow_terminal(evaluation):
    record = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert record["gallery"] == {"images": 120, "classes": [3, 4], "origin": "never seen in training"}
    assert {row["distance"] for row in record["measurements"] if row["task"] != "linear"} == {"cosine"}
    assert {(row["task"], row["features"]) for row in record["measurements"]} >= {("retrieval", "learned")}
    shown = printed_text(sheets(evaluation))
    assert "Retrieval by cosine among 120 test images of 2 classes never seen in training" in " ".join(shown.split())
    for task, kind in {(own.task, own.features) for own in evaluation.measurements}:
        others = ("clusters", "silhouette", "threshold")
        shares = [own for own in evaluation.of(task, features=kind) if own.metric not in others]
        line = [f"{100 * own.value:.1f}" for own in shares]
        rows = [row for row in shown.splitlines() if row.split()[:1] == kind.split()[:1]]
        assert any(all(number in row for number in line) for row in rows), (task, kind, shown)


def test_recall_at_one_is_measured_whatever_the_grid(inputs):
    features, *labels = inputs
    protocol = ProtocolSettings(retrieval=RetrievalSettings(recall_at=(10,), ndcg_at=()))
    actual = compare(features, *labels, protocol, tasks=("retrieval",))
    names = [own.metric for own in actual.of("retrieval", features="learned")]
    assert names == ["Recall@1", "Recall@10", "R-precision", "MAP@R"]
    assert len(actual.differences) == 1


def test_training_features_are_needed_by_knn_the_probe_and_fitted_metrics_alone(inputs):
    features, *labels = inputs
    assert takes_training(("knn",), Cosine())
    assert takes_training(("retrieval",), Mahalanobis())
    assert not takes_training(("retrieval", "clustering", "verification"), Euclidean())
    without: Kinds = {kind: (None, test) for kind, (_, test) in features.items()}
    tasks = ("retrieval", "clustering", "verification")
    assert (
        compare(without, *labels, PROTOCOL, tasks=tasks).measurements
        == compare(features, *labels, PROTOCOL, tasks=tasks).measurements
    )


def test_a_metric_is_fitted_on_seen_classes_without_the_images_held_out_and_used_by_all_but_the_probe():
    features, *labels = kinds({"learned": 0.5}, nuisance=20.0)
    kept: dict[str, LinearMetric] = {}
    options = {"tasks": ("knn", "linear", "retrieval"), "gallery": gallery_of(*labels)}
    fitted = compare(features, *labels, PROTOCOL, metric=Mahalanobis(), keep=kept.__setitem__, **options)
    plain = compare(features, *labels, PROTOCOL, metric=Euclidean(), **options)
    train, test = features["learned"]
    assert train is not None
    chosen, _ = hold_out(labels[0], share=PROTOCOL.held_out, seed=PROTOCOL.seed)
    chosen = chosen[labels[0][chosen] < 3]
    expected = Mahalanobis().fit(train[chosen], labels[0][chosen])
    assert torch.equal(kept["learned"].weights, expected.weights)
    images = torch.isin(labels[1], torch.tensor(UNSEEN))
    looked_up = retrieve(expected.transform(test[images]), labels[1][images], nearness="euclidean")
    (precision,) = fitted.of("retrieval", metric="MAP@R")
    assert precision.value == pytest.approx(looked_up.map_at_r.mean().item())
    both = fitted.measurements, plain.measurements
    # Numbers that say nothing drown the classes in the plain distance, and not in the fitted one.
    actual = {(own.task, own.metric): (own.value, other.value) for own, other in zip(*both, strict=True)}
    for leading in (("knn", "accuracy"), ("retrieval", "Recall@1")):
        assert actual[leading][0] > actual[leading][1] + 0.3
    assert actual["linear", "accuracy"][0] == actual["linear", "accuracy"][1]
    assert "kNN by mahalanobis" in sheets(fitted)[0].title


def test_a_vote_by_euclidean_distance_does_not_depend_on_the_scale():
    features, *labels = kinds({"learned": 2.0})
    grid = ProtocolSettings(knn=KnnSettings(neighbours=(5, 50), temperatures=(0.02, 0.2)))
    train, test = features["learned"]
    assert train is not None
    one = compare(features, *labels, grid, tasks=("knn",), metric=Euclidean())
    two = compare({"learned": (64 * train, 64 * test)}, *labels, grid, tasks=("knn",), metric=Euclidean())
    assert one.measurements == two.measurements


def test_what_the_labels_rule_out_is_refused_in_words(inputs):
    features, train_labels, test_labels = inputs
    labels = train_labels, test_labels
    one = gallery_of(*labels, (3,))
    with pytest.raises(ValueError, match="60 test images of 1 class are to be compared"):
        compare(features, *labels, PROTOCOL, tasks=("retrieval",), gallery=one)
    assert compare(features, *labels, PROTOCOL, tasks=("knn",), gallery=one).measurements
    with pytest.raises(ValueError, match="leave more classes to it"):
        compare(
            features,
            *labels,
            PROTOCOL,
            tasks=("retrieval",),
            gallery=gallery_of(*labels, (1, 2, 3, 4)),
            metric=Mahalanobis(),
        )
    with pytest.raises(ValueError, match="no test image has a label"):
        compare(features, train_labels, torch.full((300,), -1), PROTOCOL)


def test_a_class_with_a_single_test_image_is_left_out_of_retrieval_and_said_so(inputs):
    features, train_labels, test_labels = inputs
    lonely = test_labels.clone()
    lonely[(test_labels == 4).nonzero().squeeze(1)[1:]] = -1
    actual = compare(features, train_labels, lonely, PROTOCOL, tasks=("retrieval", "clustering"))
    assert {(own.n, own.details["left_out"]) for own in actual.of("retrieval")} == {(240, 1)}
    assert "1 left out" in sheets(actual)[0].title
    assert {own.n for own in actual.of("clustering")} == {241}


@pytest.fixture(scope="module")
def three() -> tuple[Kinds, Tensor, Tensor]:
    return kinds({"learned": 0.7, "random weights": 3.0, "raw pixels": 1.5}, dim=12)


@pytest.fixture(scope="module")
def probed(three) -> Evaluation:
    return compare(*three, PROBES)


def test_two_evaluations_are_equal_bit_for_bit_and_leave_the_generator_alone(three, probed):
    before = torch.random.get_rng_state()
    assert compare(*three, PROBES) == probed
    assert torch.equal(before, torch.random.get_rng_state())


def test_permuting_the_test_labels_changes_no_choice(three, probed):
    features, train_labels, test_labels = three
    shuffled = test_labels[torch.randperm(300, generator=torch.Generator().manual_seed(7))]
    other = compare(features, train_labels, shuffled, PROBES)
    for one, two in zip(probed.measurements, other.measurements, strict=True):
        assert one.details == two.details
        assert one.value > two.value


def test_a_standardisation_or_a_bank_never_sees_the_test_images_of_others(three, probed):
    features, train_labels, test_labels = three
    half = {kind: (train, test[:150]) for kind, (train, test) in features.items()}
    other = compare(half, train_labels, test_labels[:150], PROBES)
    for one, two in zip(probed.measurements, other.measurements, strict=True):
        assert one.details == two.details


def test_the_verdict_names_wins_losses_and_what_cannot_be_told(three, probed):
    assert probed.verdict().startswith("Ahead of every baseline: by kNN, learned features beat random weights by ")
    features, *labels = three
    worse = compare({"learned": features["random weights"], "raw pixels": features["learned"]}, *labels, PROBES)
    assert worse.verdict().startswith("Behind every baseline: by kNN, learned features fall behind raw pixels by ")
    same = compare({"learned": features["learned"], "raw pixels": features["learned"]}, *labels, PROBES)
    assert "cannot be told from raw pixels" in same.verdict()
    assert same.verdict().startswith("Not ahead of every baseline")


def test_the_record_is_json_and_the_table_shows_every_kind_with_its_choice(probed):
    record = json.loads(json.dumps(probed.to_json(), allow_nan=False))
    assert [row["features"] for row in record["measurements"][:3]] == ["learned", "random weights", "raw pixels"]
    assert record["verdict"] == probed.verdict()
    shown = printed_text(sheets(probed)[:1], width=160)
    for own in probed.measurements:
        assert own.features in shown
        assert f"{100 * own.value:.1f}" in shown
        assert own.choice
        assert own.choice in shown


def test_unlabelled_images_take_no_part(three):
    features, train_labels, test_labels = three
    train_labels, test_labels = train_labels.clone(), test_labels.clone()
    train_labels[::3], test_labels[::2] = -1, -1
    own = {"learned": features["learned"]}
    marked = compare(own, train_labels, test_labels, PROBES)
    train, test = own["learned"]
    dropped = {"learned": (train[train_labels >= 0], test[test_labels >= 0])}
    without = compare(dropped, train_labels[train_labels >= 0], test_labels[test_labels >= 0], PROBES)
    assert marked.measurements[0].n == 150
    assert marked.measurements[0].details["num_train"] == 400
    assert marked.measurements == without.measurements


def test_broken_features_are_refused_by_name(three):
    features, train_labels, test_labels = three
    train, test = features["learned"]
    with pytest.raises(ValueError, match=r"learned: 599 training features for 600 labels"):
        compare({"learned": (train[1:], test)}, train_labels, test_labels, PROBES)
    broken = test.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="learned: some test features are not finite"):
        compare({"learned": (train, broken)}, train_labels, test_labels, PROBES)


def test_the_intervals_are_those_of_the_textbooks():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    first = torch.tensor([True] * 70 + [False] * 30)
    second = torch.tensor([True] * 50 + [False] * 40 + [True] * 10)
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(0.1)
    # b = 20, c = 10, n = 100: middle 10/102, reach 1.96 sqrt(31 - 100/102) / 102.
    assert (low, high) == pytest.approx((-0.00726, 0.20334), abs=1e-4)
