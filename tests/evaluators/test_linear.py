import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from manyviews.evaluators.linear import UNCHOSEN, LinearSettings, linear, search, standard
from manyviews.evaluators.logistic import STEPS_OF_MANY, LogisticFit, logistic_regression, principal_axes
from manyviews.evaluators.splits import hold_out


def objective(fit: LogisticFit, features: Tensor, labels: Tensor, regularisations: Tensor) -> Tensor:
    """What is minimised: mean cross-entropy + regularisation / 2 × the squared weights (not biases), in float64."""
    values = []
    for weights, biases, strength in zip(fit.weights, fit.biases, regularisations.double(), strict=True):
        logits = features.double() @ weights.double().T + biases.double()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        values.append(loss + strength / 2 * weights.double().square().sum())
    return torch.stack(values)


def correlated(num: int, dim: int, classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ill-conditioned features and labels with some noise."""
    shared = torch.Generator().manual_seed(42)
    mixing = torch.randn(dim, dim, generator=shared) * torch.logspace(0, -2, dim)[:, None]
    truth = torch.randn(dim, classes, generator=shared)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, dim, generator=generator) @ mixing + 3
    noise = torch.randn(num, classes, generator=generator)
    return features, ((features - 3) @ truth + 2 * noise).argmax(1)


@pytest.mark.parametrize(("dim", "classes"), [(20, 5), (6, 3)])
@pytest.mark.parametrize("rotated", [True, False])
def test_the_optimum_is_that_of_scikit_learn(dim, classes, rotated, monkeypatch):
    if not rotated:
        monkeypatch.setattr("manyviews.evaluators.logistic.MOST_DIRECTIONS", 1)
    features, labels = correlated(300, dim, classes)
    features = standard(features.double())(features.double())
    strengths = torch.tensor([1e-3, 1e-2, 0.1, 1.0], dtype=torch.float64)
    fit = logistic_regression(features, labels, strengths, classes, tolerance=1e-12)
    assert fit.converged.all()
    for number, strength in enumerate(strengths.tolist()):
        model = LogisticRegression(C=1 / (strength * 300), tol=1e-9, max_iter=10_000).fit(features, labels)
        coefficients = torch.from_numpy(model.coef_)[None], torch.from_numpy(model.intercept_)[None]
        their_fit = LogisticFit(*coefficients, fit.converged[:1], fit.steps[:1])
        their_value = objective(their_fit, features, labels, strengths[number, None]).item()
        own_value = objective(fit, features, labels, strengths)[number].item()
        assert own_value == pytest.approx(their_value, abs=1e-9)
        torch.testing.assert_close(fit.weights[number], coefficients[0][0], atol=2e-4, rtol=1e-3)
        assert fit.predict(features)[number].tolist() == model.predict(features).tolist()


def test_the_gradient_at_the_optimum_is_zero_by_autograd():
    features, labels = correlated(200, 8, 4)
    features = standard(features.double())(features.double())
    strengths = torch.tensor([1e-2, 1.0], dtype=torch.float64)
    fit = logistic_regression(features, labels, strengths, 4, tolerance=1e-14)
    leaf = fit._replace(weights=fit.weights.requires_grad_(), biases=fit.biases.requires_grad_())
    objective(leaf, features, labels, strengths).sum().backward()
    assert leaf.weights.grad.abs().max() < 1e-6
    assert leaf.biases.grad.abs().max() < 1e-6


def test_a_grid_solved_at_once_equals_its_parts(monkeypatch):
    features, labels = correlated(200, 8, 4)
    features, strengths = standard(features)(features), torch.tensor([1e-2, 0.1, 1.0])
    together = logistic_regression(features, labels, strengths, 4, tolerance=1e-8)
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_LOGITS", 1)
    apart = logistic_regression(features, labels, strengths, 4, tolerance=1e-8)
    torch.testing.assert_close(together.weights, apart.weights, atol=1e-3, rtol=1e-3)


def test_float32_comes_within_the_tolerance_of_float64():
    features, labels = correlated(2000, 40, 10)
    features, strengths = standard(features)(features), torch.tensor([1e-4, 1e-2, 1.0])
    single = logistic_regression(features, labels, strengths, 10)
    double = logistic_regression(features.double(), labels, strengths.double(), 10, tolerance=1e-12)
    gap = objective(single, features, labels, strengths) - objective(double, features, labels, strengths)
    assert single.converged.all()
    assert gap.max() < 1e-4


def test_a_mask_of_images_gives_the_fit_on_those_images():
    features, labels = correlated(200, 8, 4)
    features = standard(features.double())(features.double())
    used = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    strengths = torch.tensor([1e-2, 0.1, 1e-2], dtype=torch.float64)
    together = logistic_regression(features, labels, strengths, 4, used=used, tolerance=1e-13)
    for number, seen in enumerate(used):
        alone = logistic_regression(features[seen], labels[seen], strengths[[number]], 4, tolerance=1e-13)
        torch.testing.assert_close(together.weights[number], alone.weights[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.biases[number], alone.biases[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("images", [3000, 30])
def test_the_start_and_the_axes_change_the_way_and_not_the_minimum(images, monkeypatch):
    features, labels = correlated(images, 40, 4)
    features = standard(features.double())(features.double())
    strength = torch.tensor([1e-2], dtype=torch.float64)
    fit = logistic_regression(features, labels, strength, 4, tolerance=1e-13)
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_SEEN", 50)
    roughly = logistic_regression(features, labels, strength, 4, tolerance=1e-3)
    again = logistic_regression(features, labels, strength, 4, start=roughly, tolerance=1e-13)
    elsewhere = logistic_regression(features, labels, strength, 4, axes=torch.eye(40).double(), tolerance=1e-13)
    for other in (again, elsewhere):
        torch.testing.assert_close(other.weights, fit.weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other.biases, fit.biases, atol=1e-5, rtol=1e-4)
    assert logistic_regression(features, labels, strength, 4, start=fit, tolerance=1e-9).steps.tolist() == [0]


def test_principal_axes_are_orthonormal_and_hold_all_there_is():
    for images in (30, 300):
        features, _ = correlated(images, 40, 4)
        axes = principal_axes(features)
        assert axes.shape == (40, min(images, 40))
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(features @ axes @ axes.T, features, atol=1e-4, rtol=1e-4)


def test_features_that_never_vary_and_more_features_than_images_are_safe():
    features, labels = correlated(60, 100, 3)
    features[:, 7], features[:, 8] = 0.1, 0.0
    scaled = standard(features)(features)
    assert scaled[:, 7:9].abs().max() == 0
    unseen = features.clone()
    unseen[:, 7] = 5
    assert torch.equal(standard(features)(unseen)[:, 7], torch.zeros(60))
    fit = logistic_regression(scaled, labels, torch.tensor([1e-2]), 3)
    assert fit.converged.all()
    assert fit.weights.isfinite().all()
    assert fit.weights[0, :, 7:9].abs().max() < 1e-5


def test_a_problem_that_is_cut_off_says_so():
    features, labels = correlated(200, 20, 5)
    fit = logistic_regression(standard(features)(features), labels, torch.tensor([1e-4, 10.0]), 5, max_steps=5)
    assert fit.converged.tolist() == [False, True]


def test_the_strength_is_the_best_on_the_held_out_part_and_the_probe_is_refitted_on_all():
    features, labels = correlated(500, 30, 5)
    labels[::11] = -1
    test, _ = correlated(100, 30, 5, seed=1)
    settings = LinearSettings(regularisations=(1e-4, 1e-2, 1.0, 100.0))
    result = linear(features, labels, test, 5, settings, share=0.3, seed=2)
    kept, held = hold_out(labels, share=0.3, seed=2)
    accuracies = {}
    for strength in settings.regularisations:
        model = theirs(strength, len(kept)).fit(features[kept], labels[kept])
        accuracies[strength] = model.score(features[held], labels[held])
    assert result.chosen["regularisation"] == max(accuracies, key=accuracies.__getitem__)
    assert result.validation == pytest.approx(max(accuracies.values()), abs=1.01 / len(held))
    every = labels >= 0
    model = theirs(result.chosen["regularisation"], int(every.sum())).fit(features[every], labels[every])
    assert (result.predictions == torch.from_numpy(model.predict(test))).float().mean() >= 0.98


def test_a_single_strength_is_not_chosen_and_needs_no_held_out_part():
    features = correlated(3, 5, 3)[0]
    result = linear(features, torch.tensor([0, 1, 2]), features, 3, LinearSettings(regularisations=(1e-3,)))
    assert result.predictions.tolist() == [0, 1, 2]
    assert result.validation is None


def theirs(strength: float, images: int) -> Pipeline:
    """The same probe by scikit-learn, whose standardisation too sees nothing but what it is fitted on."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * images), max_iter=10_000, tol=1e-8))


def test_many_classes_take_the_diagonal_and_reach_the_same_minimum(monkeypatch):
    features, labels = correlated(400, 12, 6)
    features, strengths = standard(features.double())(features.double()), torch.tensor([1e-2, 0.3]).double()
    exact = logistic_regression(features, labels, strengths, 6, tolerance=1e-12)
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_MODES", 5)
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_REMEMBERED", 1)
    actual = logistic_regression(features, labels, strengths, 6, tolerance=1e-12)
    assert actual.converged.all()
    torch.testing.assert_close(actual.weights, exact.weights, atol=1e-5, rtol=1e-4)


def test_a_grid_too_large_for_memory_is_searched_from_strong_to_weak(monkeypatch):
    features, labels = correlated(300, 12, 5)
    test, _ = correlated(50, 12, 5, seed=1)
    settings = LinearSettings()
    whole = linear(features, labels, test, 5, settings)
    reports = []
    monkeypatch.setattr("manyviews.evaluators.linear.at_once", lambda *_: 1)
    parts = linear(features, labels, test, 5, settings, report=lambda *args: reports.append(args))
    assert parts[1:] == whole[1:]
    assert parts.predictions.tolist() == whole.predictions.tolist()
    assert {total for _, _, total in reports} == {11}
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


def test_two_parts_of_a_grid_that_bring_nothing_better_end_the_search():
    hits, asked = {3.0: 5, 1.0: 5, 0.3: 8, 0.1: 8, 0.03: 7, 0.01: 9}, []

    def judge(grid, begin, before):
        asked.extend(round(strength, 2) for strength in grid.tolist())
        assert (begin is None) == (before == 0)
        empty = torch.zeros(len(grid), 1)
        fit = LogisticFit(empty[..., None], empty, empty[:, 0] > 0, empty[:, 0].long())
        return fit, torch.tensor([hits[round(strength, 2)] for strength in grid.tolist()])

    assert search(torch.tensor(list(hits)), 1, judge)[:2] == (2, 8)
    assert asked == [3.0, 1.0, 0.3, 0.1, 0.03]
    assert search(torch.tensor(list(hits)), 6, judge)[:2] == (5, 9)


def test_where_no_class_has_a_second_image_the_strength_is_not_chosen():
    features, _ = correlated(30, 6, 5)
    labels = torch.arange(30)
    actual = linear(features, labels, features, 30, LinearSettings())
    assert actual.chosen == {"regularisation": UNCHOSEN}
    assert actual.validation is None
    scaled = standard(features)(features)
    fit = logistic_regression(scaled, labels, torch.tensor([UNCHOSEN]), 30)
    assert actual.predictions.tolist() == fit.predict(scaled)[0].tolist()


@pytest.mark.parametrize("most", [None, 3])
def test_of_small_classes_one_image_each_is_held_out(most):
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, -1, 4, 4, 4, 4])
    kept, held = hold_out(labels, share=0.1, seed=3, most=most, one_each=True)
    assert sorted(torch.cat([kept, held]).tolist()) == [*range(8), *range(9, 13)]
    assert len(held) == (4 if most is None else 3)
    assert len(set(labels[held].tolist())) == len(held)
    assert 2 not in labels[held]
    again = hold_out(labels, share=0.1, seed=3, most=most, one_each=True)
    assert torch.equal(kept, again[0])
    assert torch.equal(held, again[1])
    own = hold_out(labels, share=0.5, seed=3, one_each=True)
    assert all(torch.equal(one, two) for one, two in zip(own, hold_out(labels, share=0.5, seed=3), strict=True))


def test_a_large_set_of_small_classes_has_its_choice_within_the_most():
    """A share of 10,000 of many images is not one image of a class of 50."""
    labels = torch.arange(400).repeat_interleave(5)
    kept, held = hold_out(labels, share=0.2, seed=0, most=100, one_each=True)
    assert (len(kept), len(held)) == (1900, 100)
    with pytest.raises(ValueError, match="leave 2000 kept and 0 held out"):
        hold_out(labels, share=0.2, seed=0, most=100)


def test_with_many_classes_a_fit_ends_after_few_steps_and_says_so(monkeypatch):
    features, labels = correlated(200, 20, 5)
    scaled, strength = standard(features)(features), torch.tensor([1e-7])
    assert logistic_regression(scaled, labels, strength, 5).converged.all()
    monkeypatch.setattr("manyviews.evaluators.logistic.MOST_CLASSES_SOLVED", 4)
    fit = logistic_regression(scaled, labels, strength, 5)
    assert (fit.converged.tolist(), fit.steps.tolist()) == ([False], [STEPS_OF_MANY])
