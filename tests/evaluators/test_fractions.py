import statistics

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from manyviews.evaluators import fractions as module
from manyviews.evaluators.fractions import FractionSettings, draw, fractions, mean_of_draws
from manyviews.evaluators.results.measurement import Evaluation
from manyviews.evaluators.results.tables import sheets
from recorded import printed_text

SETTINGS = FractionSettings(shares=(0.1,), shots=(4,), draws=3, regularisations=(1e-2, 0.3, 3.0))


def clusters(num: int, classes: int = 4, dim: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, and their classes."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    return centres[labels] + 2.5 * torch.randn(num, dim, generator=generator) + 1, labels


@pytest.mark.parametrize("amount", [3, 0.1])
def test_a_draw_takes_the_same_of_every_class_and_nothing_unlabelled(amount):
    labels = torch.arange(4).repeat_interleave(torch.tensor([100, 50, 2, 10]))
    labels[::9] = -1
    chosen, ranks = draw(labels, amount, seed=0, number=0)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    present = labels[labels >= 0].bincount()
    wanted = [3, 3, 2, 3] if amount == 3 else [max(1, round(0.1 * count)) for count in present.tolist()]
    assert labels[chosen].bincount().tolist() == torch.minimum(torch.tensor(wanted), present).tolist()
    for number in range(4):
        assert sorted(ranks[labels[chosen] == number].tolist()) == list(range(wanted[number]))


def test_a_draw_is_a_function_of_seed_and_number_and_fewer_labels_are_some_of_the_more():
    labels = torch.arange(5).repeat(40)
    first = draw(labels, 8, seed=3, number=1)[0]
    assert torch.equal(first, draw(labels, 8, seed=3, number=1)[0])
    assert not torch.equal(first, draw(labels, 8, seed=4, number=1)[0])
    assert not torch.equal(first, draw(labels, 8, seed=3, number=2)[0])
    assert torch.isin(draw(labels, 2, seed=3, number=1)[0], first).all()
    assert torch.isin(draw(labels, 0.1, seed=3, number=1)[0], first).all()
    assert len(draw(labels, 1.0, seed=3, number=1)[0]) == 200


@pytest.mark.parametrize("many", [2000, 20])
def test_choice_and_accuracy_are_those_of_scikit_learn(many, monkeypatch):
    monkeypatch.setattr("manyviews.evaluators.fractions.MANY", many)
    (train, labels), (test, test_labels) = clusters(900), clusters(300, seed=1)
    train, test = train.double(), test.double()
    scaler = StandardScaler().fit(train)
    scaled, test_scaled = torch.from_numpy(scaler.transform(train)), torch.from_numpy(scaler.transform(test))
    tenth, shots = fractions(train, labels, test, test_labels, 4, SETTINGS, seed=5)
    assert (tenth.metric, shots.metric) == ("10 %", "4 of each class")
    for result, amount, folds in ((tenth, 0.1, 5), (shots, 4, 4)):
        for number, accuracy in enumerate(result.details["accuracies"]):
            chosen, ranks = draw(labels, amount, seed=5, number=number)
            assert len(chosen) == result.n
            features, own = scaled[chosen], labels[chosen]
            hits = {}
            for strength in SETTINGS.regularisations:
                hits[strength] = 0
                for fold in range(folds if len(chosen) < many else 1):
                    held = ranks % folds == fold
                    model = LogisticRegression(C=1 / (strength * int((~held).sum())), tol=1e-8, max_iter=10_000)
                    model.fit(features[~held], own[~held])
                    hits[strength] += int((torch.from_numpy(model.predict(features[held])) == own[held]).sum())
            # Judged near the minimum, not at it: an image may fall to the other side.
            assert hits[result.details["regularisations"][number]] >= max(hits.values()) - 1
            strength = result.details["regularisations"][number]
            model = LogisticRegression(C=1 / (strength * len(chosen)), tol=1e-8, max_iter=10_000).fit(features, own)
            assert accuracy == pytest.approx(model.score(test_scaled, test_labels), abs=0.015)


def test_with_one_image_of_each_class_the_strength_is_the_fixed_one():
    (train, labels), (test, test_labels) = clusters(100), clusters(50, seed=1)
    settings = SETTINGS.model_copy(update={"shots": (1,), "shares": (), "single": 0.7})
    (result,) = fractions(train, labels, test, test_labels, 4, settings)
    assert result.n == 4
    assert result.details["regularisations"] == [0.7] * 3
    assert result.value > 0.4


def test_a_class_with_a_single_image_is_never_held_out():
    train, labels = clusters(60)
    labels[labels == 3] = 2
    labels[0] = 3
    settings = SETTINGS.model_copy(update={"shares": (1.0,), "shots": (2,)})
    whole, few = fractions(train, labels, train, labels, 4, settings)
    assert (whole.n, few.n) == (60, 7)
    assert whole.deviation == 0


def test_test_images_without_a_label_do_not_count_and_labels_must_exist():
    (train, labels), (test, test_labels) = clusters(200), clusters(80, seed=1)
    test_labels[:30] = -1
    actual = fractions(train, labels, test, test_labels, 4, SETTINGS)
    assert actual == fractions(train, labels, test[30:], test_labels[30:], 4, SETTINGS)
    with pytest.raises(ValueError, match="labelled test images"):
        fractions(train, labels, test, torch.full((80,), -1), 4, SETTINGS)


def test_the_table_has_a_row_for_each_kind_and_mean_and_deviation():
    rows = [mean_of_draws(kind, "1 %", 600, (0.8, 0.9, 0.85), ()) for kind in ("learned", "raw pixels")]
    assert rows[0].deviation == pytest.approx(statistics.stdev([0.8, 0.9, 0.85]))
    text = printed_text(sheets(Evaluation(tuple(rows))), width=100)
    assert text.count("85.0 ± 5.0") == 2
    assert "1 % (600)" in text


def test_draws_of_the_same_images_are_fitted_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(2)
    train, test = torch.randn(16, 5, generator=generator), torch.randn(16, 5, generator=generator)
    calls, reports, fitted = [], [], module._probe
    monkeypatch.setattr(module, "_probe", lambda *args: calls.append(0) or fitted(*args))
    settings = FractionSettings(shares=(1.0,), shots=(2, 5), draws=3)
    actual = fractions(train, labels, test, labels, 8, settings, report=lambda *args: reports.append(args))
    assert len(calls) == 1
    assert len({tuple(result.details["accuracies"]) for result in actual}) == 1
    assert actual[0].deviation == 0
    assert {(what, total) for what, _, total in reports} == {("few labels", 9)}
