import json

import pytest
import torch
from rich.console import Console
from torch import Tensor

from manyviews.evaluators.compare import compare
from manyviews.evaluators.knn import KnnSettings
from manyviews.evaluators.linear import LinearSettings
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.results.intervals import paired_difference, wilson
from manyviews.evaluators.results.measurement import Evaluation
from manyviews.evaluators.results.tables import printed, sheets

PROTOCOL = ProtocolSettings(
    knn=KnnSettings(neighbours=(1, 10, 50), temperatures=(0.07, 0.3)),
    linear=LinearSettings(regularisations=(1e-3, 0.1, 10.0)),
)


def kinds(noise: dict[str, float]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    train_labels, test_labels = torch.arange(600) % 5, torch.arange(300) % 5
    centres = torch.randn(5, 12, generator=generator)

    def draw(labels: Tensor, amount: float) -> Tensor:
        return centres[labels] + amount * torch.randn(len(labels), 12, generator=generator)

    features = {kind: (draw(train_labels, amount), draw(test_labels, amount)) for kind, amount in noise.items()}
    return features, train_labels, test_labels


@pytest.fixture(scope="module")
def inputs() -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
    return kinds({"learned": 0.7, "random weights": 3.0, "raw pixels": 1.5})


@pytest.fixture(scope="module")
def evaluation(inputs) -> Evaluation:
    return compare(*inputs, PROTOCOL)


def test_two_evaluations_are_equal_bit_for_bit_and_leave_the_generator_alone(inputs, evaluation):
    before = torch.random.get_rng_state()
    assert compare(*inputs, PROTOCOL) == evaluation
    assert torch.equal(before, torch.random.get_rng_state())


def test_permuting_the_test_labels_changes_no_choice(inputs, evaluation):
    features, train_labels, test_labels = inputs
    shuffled = test_labels[torch.randperm(300, generator=torch.Generator().manual_seed(7))]
    other = compare(features, train_labels, shuffled, PROTOCOL)
    for one, two in zip(evaluation.measurements, other.measurements, strict=True):
        assert one.details == two.details
        assert one.value > two.value


def test_a_standardisation_or_a_bank_never_sees_the_test_images_of_others(inputs, evaluation):
    features, train_labels, test_labels = inputs
    half = {kind: (train, test[:150]) for kind, (train, test) in features.items()}
    other = compare(half, train_labels, test_labels[:150], PROTOCOL)
    for one, two in zip(evaluation.measurements, other.measurements, strict=True):
        assert one.details == two.details


def test_the_verdict_names_wins_losses_and_what_cannot_be_told(inputs, evaluation):
    assert evaluation.verdict().startswith("Ahead of every baseline: by kNN, learned features beat random weights by ")
    features, *labels = inputs
    worse = compare({"learned": features["random weights"], "raw pixels": features["learned"]}, *labels, PROTOCOL)
    assert worse.verdict().startswith("Behind every baseline: by kNN, learned features fall behind raw pixels by ")
    same = compare({"learned": features["learned"], "raw pixels": features["learned"]}, *labels, PROTOCOL)
    assert "cannot be told from raw pixels" in same.verdict()
    assert same.verdict().startswith("Not ahead of every baseline")


def test_the_record_is_json_and_the_table_shows_every_kind_with_its_choice(evaluation):
    record = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert [row["features"] for row in record["measurements"][:3]] == ["learned", "random weights", "raw pixels"]
    assert record["verdict"] == evaluation.verdict()
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(printed(sheets(evaluation)[0]))
    console.file.close()
    shown = console.export_text()
    for own in evaluation.measurements:
        assert own.features in shown
        assert f"{100 * own.value:.1f}" in shown
        assert own.choice
        assert own.choice in shown


def test_unlabelled_images_take_no_part(inputs):
    features, train_labels, test_labels = inputs
    train_labels, test_labels = train_labels.clone(), test_labels.clone()
    train_labels[::3], test_labels[::2] = -1, -1
    own = {"learned": features["learned"]}
    marked = compare(own, train_labels, test_labels, PROTOCOL)
    train, test = own["learned"]
    dropped = {"learned": (train[train_labels >= 0], test[test_labels >= 0])}
    without = compare(dropped, train_labels[train_labels >= 0], test_labels[test_labels >= 0], PROTOCOL)
    assert marked.measurements[0].n == 150
    assert marked.measurements[0].details["num_train"] == 400
    assert marked.measurements == without.measurements


def test_broken_features_are_refused_by_name(inputs):
    features, train_labels, test_labels = inputs
    train, test = features["learned"]
    with pytest.raises(ValueError, match=r"learned: 599 training features for 600 labels"):
        compare({"learned": (train[1:], test)}, train_labels, test_labels, PROTOCOL)
    broken = test.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="learned: some test features are not finite"):
        compare({"learned": (train, broken)}, train_labels, test_labels, PROTOCOL)


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
