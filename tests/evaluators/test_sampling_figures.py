"""Distances that samplers choose, against loops and the objectives, and the gradient's variance."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from manyviews.evaluators import sampling
from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.sampling import (
    BINS,
    OWN,
    SamplingFigures,
    counts,
    gradient_variance,
    sampling_figures,
)
from manyviews.evaluators.sampling_plots import mean_variance, sampling_figure
from manyviews.objectives.mining import (
    All,
    DistanceWeighted,
    Hardest,
    Random,
    Sampling,
    SemiHard,
    WithinMargin,
    batch_of,
    choose,
    density,
)

IDS = torch.tensor([3, 3, 3, 8, 5, 5, 0, 9, 5, 3])
OWNS: list[Sampling] = [All(), Random(), SemiHard(), Hardest(), DistanceWeighted()]
OWNS.append(WithinMargin(margin=0.4, squared=True, positives="random"))


def embeddings(views: int = 2, batch: int = 10, dim: int = 6, *, seed: int = 0) -> Tensor:
    return torch.randn(views, batch, dim, generator=torch.Generator().manual_seed(seed))


def figures(z: Tensor, ids: Tensor, own: Sampling, **options: Any) -> SamplingFigures:
    return sampling_figures(z, ids, own, **({"normalized": True, "seed": 3, "step": 7} | options))


@pytest.mark.parametrize("normalized", [True, False])
def test_distances_of_positives_and_negatives_are_those_of_loops(normalized: bool) -> None:
    z = 3 * embeddings()
    found = figures(z, IDS, SemiHard(), normalized=normalized)
    rows, ids = z.flatten(0, 1).double(), IDS.repeat(2).tolist()
    expected = {True: [0] * BINS, False: [0] * BINS}
    for a in range(20):
        for b in range(20):
            if a != b:
                gap = rows[a] / rows[a].norm() - rows[b] / rows[b].norm()
                expected[ids[a] == ids[b]][int(gap.norm() * BINS / 2)] += 1
    assert found.positives == tuple(expected[True])
    assert found.negatives == tuple(expected[False])
    assert (found.embeddings, found.dim, found.whole, found.normalized) == (20, 6, True, normalized)
    assert ("distance-weighted" in found.chosen) == normalized


@pytest.mark.parametrize("own", OWNS, ids=lambda own: own.name)
def test_what_the_run_has_chosen_is_what_its_objective_compares(own: Sampling) -> None:
    z = embeddings()
    batch = batch_of(z, IDS, normalized=True, seed=3, step=7)
    products = batch.anchors @ batch.candidates.T
    triples = choose(own, batch, slice(0, 20), products)
    ids = IDS.repeat(2)
    if triples.negatives is None:
        pairs = ids[:, None] != ids
        chosen = products[pairs]
    else:
        chosen = products.gather(1, triples.negatives)[triples.chosen]
    assert figures(z, IDS, own).chosen[OWN] == counts((2 - 2 * chosen).sqrt())
    assert sum(figures(z, IDS, own).chosen[OWN]) > 0


def test_every_sampler_chooses_among_the_negatives_and_the_hardest_chooses_the_nearest() -> None:
    found = figures(embeddings(batch=40), torch.arange(40) // 4, SemiHard())
    assert list(found.chosen) == ["random", "semi-hard", "within the margin", "hardest", "distance-weighted", OWN]
    positives = sum(found.positives)
    for name, own in found.chosen.items():
        assert 0 < sum(own) <= positives
        assert all(there or not here for here, there in zip(own, found.negatives, strict=True)), name
    means = {name: np.average(range(BINS), weights=own) for name, own in found.chosen.items()}
    assert min(means, key=means.__getitem__) == "hardest"
    assert means["hardest"] < means["distance-weighted"] < means["random"]


def test_of_a_large_batch_the_first_images_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST", 12)
    z = embeddings()
    found = figures(z, IDS, SemiHard())
    assert (found.embeddings, found.whole) == (12, False)
    assert found.negatives == figures(z[:, :6], IDS[:6], SemiHard()).negatives


@pytest.mark.parametrize(
    "ids", [torch.arange(10), torch.zeros(10, dtype=torch.int64)], ids=["no positives", "no negatives"]
)
@pytest.mark.parametrize("own", OWNS, ids=lambda own: own.name)
def test_a_batch_without_positives_or_negatives_is_drawn_too(own: Sampling, ids: Tensor) -> None:
    found = figures(embeddings(1), ids, own)
    assert not any(map(sum, found.chosen.values()))
    assert math.isnan(mean_variance(found.chosen[OWN], 6))
    assert as_pixels(sampling_figure(found), 30).shape[0] == 3


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        figures(embeddings() * torch.inf, IDS, SemiHard())


def test_figures_are_read_back_from_their_text_and_damaged_ones_are_refused() -> None:
    found = figures(embeddings(), IDS, SemiHard())
    assert SamplingFigures.model_validate_json(found.model_dump_json()) == found
    values = found.model_dump()
    for wrong in ({"positives": (1, 2)}, {"own": "$\\frac$"}, {"chosen": {"<b>": found.negatives}}, {"dim": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingFigures.model_validate(values | wrong)


@pytest.mark.parametrize("dim", [2, 3, 4, 16, 128, 2048])
def test_the_density_of_distances_is_that_of_a_beta_distribution(dim: int) -> None:
    distances = torch.linspace(0.01, 1.99, 50, dtype=torch.float64)
    shape = (dim - 1) / 2
    expected = stats.beta.pdf(distances.square().numpy() / 4, shape, shape) * distances.numpy() / 2
    torch.testing.assert_close(density(distances, dim), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert density(torch.tensor([-0.1, 0.0, 2.0, 2.1]), dim).tolist() == [0, 0, 0, 0]


def test_points_have_distances_on_a_sphere_of_two_dimensions_or_more() -> None:
    with pytest.raises(ValueError, match=r"dim 1: .* in two dimensions or more"):
        density(torch.ones(1), 1)


@pytest.mark.parametrize("dim", [2, 8, 128])
@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
def test_the_variance_of_the_gradient_is_that_of_directions_with_noise(dim: int, noise: float) -> None:
    draws = np.random.default_rng(0).normal(size=(20_000, dim)) * noise / math.sqrt(dim)
    for distance in (0.05, 0.3, 1.0, 1.9):
        moved = draws + np.eye(dim)[0] * distance
        directions = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        expected = np.cov(directions.T).trace()
        assert gradient_variance(np.array([distance]), dim, noise) == pytest.approx(expected, abs=0.01)


def test_the_variance_falls_from_one_as_the_negative_is_farther() -> None:
    curve = gradient_variance(np.linspace(0, 2, 50), 128, 0.3)
    assert curve[0] == 1
    assert (np.diff(curve) < 0).all()


def test_simulated_variances_lie_on_the_curve() -> None:
    found = figures(embeddings(batch=200, dim=4), torch.arange(200), Random()).simulated
    assert len(found) == sampling.POINTS
    assert found[0][0] < 0.8
    for distance, variance in found[1:]:
        assert variance == pytest.approx(gradient_variance(np.array([distance]), 4, sampling.NOISE)[0], rel=0.1)
