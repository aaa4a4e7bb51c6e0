"""Every evaluator and linear metric on a GPU, a pretend one: values of the CPU, and few waits of the host."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from manyviews.evaluators.clustering import clustering
from manyviews.evaluators.compare import compare
from manyviews.evaluators.confusion import confusion, worst
from manyviews.evaluators.distance import Euclidean
from manyviews.evaluators.few_shot import FewShotSettings, classify_episodes, draw_episodes
from manyviews.evaluators.fractions import FractionSettings, fractions
from manyviews.evaluators.gains import ndcg
from manyviews.evaluators.geometry import geometry, neighbourhood_overlap, staleness, uniformity
from manyviews.evaluators.k_means import k_means
from manyviews.evaluators.knn import KnnSettings, knn, monitor_knn
from manyviews.evaluators.linear import LinearSettings, linear
from manyviews.evaluators.logistic import logistic_regression
from manyviews.evaluators.map import flat_map
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.retrieval import retrieve
from manyviews.evaluators.verification import VerificationSettings, draw_pairs, verify
from manyviews.features.placing import placed
from manyviews.linear_metrics import LMNN, MMC, LinearMetric, Mahalanobis
from manyviews.system import hardware
from manyviews.train.finetune.classifier import fit_probe
from pretend_cuda import Log, pretend_cuda

CLASSES, DIM = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
CENTRES = torch.randn(CLASSES, DIM, generator=GENERATOR)


def clusters(count: int) -> tuple[Tensor, Tensor]:
    """Features around the centres of their classes; some without a label."""
    labels = torch.randint(-1, CLASSES, (count,), generator=GENERATOR)
    return CENTRES[labels] + torch.randn(count, DIM, generator=GENERATOR), labels


TRAIN, TRAIN_LABELS = clusters(300)
TEST, TEST_LABELS = clusters(120)
KNOWN = TRAIN_LABELS >= 0
PAIRS = VerificationSettings(pairs=200, folds=5)
EPISODES = FewShotSettings(episodes=20)
FEW = FractionSettings(draws=2, shares=(0.2,), shots=(1, 3))

EVALUATORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "knn": lambda train, test: knn(train, TRAIN_LABELS, test, CLASSES, KnnSettings()),
    "knn by distance": lambda train, test: knn(train, TRAIN_LABELS, test, CLASSES, KnnSettings(), nearness="euclidean"),
    "knn of a run": lambda train, test: monitor_knn(train, TRAIN_LABELS),
    "linear": lambda train, test: linear(train, TRAIN_LABELS, test, CLASSES, LinearSettings()),
    "logistic regression": lambda train, test: logistic_regression(
        train[KNOWN] - train.mean(0), TRAIN_LABELS[KNOWN], torch.tensor([0.01, 1.0]), CLASSES, tolerance=1e-7
    )[:2],
    "fractions": lambda train, test: fractions(train, TRAIN_LABELS, test, TEST_LABELS, CLASSES, FEW),
    "retrieval": lambda train, test: retrieve(test, TEST_LABELS),
    "retrieval of others": lambda train, test: retrieve(test, TEST_LABELS, train, TRAIN_LABELS, nearness="euclidean"),
    "verification": lambda train, test: verify(test, draw_pairs(TEST_LABELS, PAIRS), PAIRS),
    "few-shot": lambda train, test: [
        classify_episodes(test, draw_episodes(TEST_LABELS, 3, 2, EPISODES), nearness=nearness)
        for nearness in ("cosine", "euclidean")
    ],
    "clustering": lambda train, test: clustering(test, TEST_LABELS),
    "geometry": lambda train, test: geometry("x", test, (test, test.roll(1, 0)), seed=0),
    "uniformity": lambda train, test: uniformity(train),
    "overlap": lambda train, test: neighbourhood_overlap(test, test.flip(1), 5),
    "staleness": lambda train, test: staleness(test, test.roll(1, 1)),
    "confusion": lambda train, test: confusion(
        TEST_LABELS.clamp(min=0).to(test.device), test[:, :CLASSES].argmax(1), CLASSES
    ),
    "mistakes": lambda train, test: worst(test[:, :CLASSES], TEST_LABELS.clamp(min=0).to(test.device), 5),
    "ranking": lambda train, test: ndcg((test > 0).float(), train[: len(test)], 5),
    "map": lambda train, test: flat_map(test, "pca", seed=0),
    "probe of fine-tuning": lambda train, test: fit_probe(
        train[KNOWN], TRAIN_LABELS[KNOWN], test, TEST_LABELS.clamp(min=0), CLASSES
    ),
}
METRICS: dict[str, LMNN | MMC | Mahalanobis] = {
    "lmnn": LMNN(iterations=20),
    "lmnn with a rank": LMNN(iterations=20, rank=3, start="whitening"),
    "mmc": MMC(iterations=20),
    "mmc, diagonal": MMC(iterations=20, diagonal=True),
    "mahalanobis": Mahalanobis(),
    "mahalanobis, total": Mahalanobis(covariance="total"),
}


@pytest.fixture
def log() -> Iterator[Log]:
    with pretend_cuda() as log:
        yield log


def plain(value: Any) -> Any:
    """A result as lists and numbers on the CPU."""
    if isinstance(value, Tensor):
        value = value.cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, LinearMetric):
        return plain((value.transform(TEST.to(value.weights.device)), dict(value.figures)))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return plain(vars(value)) if hasattr(value, "__dict__") else value


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, each in expected.items():
            assert_close(found[key], each)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for own, each in zip(found, expected, strict=True):
            assert_close(own, each)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_evaluator_measures_on_a_gpu_what_it_measures_on_the_cpu(name: str) -> None:
    expected = plain(EVALUATORS[name](TRAIN, TEST))
    with pretend_cuda() as log:
        train, test = TRAIN.to("cuda"), TEST.to("cuda")
        log.clear()
        found = plain(EVALUATORS[name](train, test))
        assert log.launches.total() > 0
    assert_close(found, expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_linear_metric_is_fitted_on_a_gpu_as_on_the_cpu(name: str) -> None:
    expected = plain(METRICS[name].fit(TRAIN, TRAIN_LABELS))
    with pretend_cuda():
        fitted = METRICS[name].fit(TRAIN.to("cuda"), TRAIN_LABELS)
        assert fitted.weights.device.type == "cuda"
        found = plain(fitted)
    assert_close(found, expected)


def test_the_probe_waits_few_times_in_an_iteration(log: Log) -> None:
    features, labels = TRAIN[KNOWN].to("cuda"), TRAIN_LABELS[KNOWN].to("cuda")
    strength = torch.tensor([0.01], device="cuda")
    log.clear()
    fit = logistic_regression(features - features.mean(0), labels, strength, CLASSES, tolerance=1e-7)
    waits, steps = log.waits.total(), int(fit.steps)
    assert steps >= 8
    assert waits <= 3 * steps
    assert log.launches.total() <= 160 * steps


def test_many_more_images_take_no_more_waits_and_launches(log: Log) -> None:
    def counted(times: int) -> tuple[int, int]:
        train, test = TRAIN.repeat(times, 1).to("cuda"), TEST.repeat(times, 1).to("cuda")
        log.clear()
        knn(train, TRAIN_LABELS.repeat(times), test + 0.1, CLASSES, KnnSettings())
        retrieve(test, TEST_LABELS.repeat(times))
        return log.waits.total(), log.launches.total()

    waits, launches = counted(1)
    assert waits <= 24
    more = counted(20)
    assert more[0] <= waits
    assert more[1] <= 1.2 * launches


def test_features_are_placed_on_the_gpu_where_they_fit(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed(TRAIN).device.type == "cuda"
    monkeypatch.setattr(hardware, "free", lambda gpu: 3 * TRAIN.nbytes)
    assert placed(TRAIN, 2).device.type == "cuda"
    assert placed(TRAIN, 3).device.type == "cpu"
    assert placed(TRAIN, 1, 2 * TRAIN.nbytes).device.type == "cpu"
    # What is there already counts as free.
    assert placed(TRAIN.to("cuda"), 3).device.type == "cuda"
    assert placed(TRAIN.to("cuda"), 4).device.type == "cpu"


@pytest.mark.parametrize(
    ("room", "metric"),
    [
        (4 * TRAIN.nbytes, Mahalanobis()),
        pytest.param(80 << 30, None, marks=pytest.mark.slow),
        pytest.param(2 * TRAIN.nbytes // 3, Euclidean(), marks=pytest.mark.slow),
        pytest.param(0, None, marks=pytest.mark.slow),
    ],
)
def test_all_tasks_together_measure_the_same_whatever_fits_on_the_gpu(
    room: int, metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: Any = ("knn", "linear", "retrieval", "clustering", "verification")
    protocol = ProtocolSettings(verification=PAIRS, linear=LinearSettings(regularisations=(0.01, 1.0)))

    def measured() -> Any:
        given = {"backbone": (TRAIN, TEST), "pixels": (TRAIN[:, :6], TEST[:, :6])}
        found = compare(given, TRAIN_LABELS, TEST_LABELS, protocol, tasks=tasks, metric=metric)
        return plain([[vars(one) for one in found.measurements], found.predictions, found.hits])

    expected = measured()
    with pretend_cuda() as log:
        monkeypatch.setattr(hardware, "free", lambda gpu: room)
        found = measured()
        assert (log.launches.total() > 0) == (room > 0)
    assert_close(found, expected)


@pytest.mark.parametrize("clusters", [2, 5, 40, 300])
def test_k_means_on_a_gpu_finds_the_clusters_of_scikit_learn(clusters: int, log: Log) -> None:
    expected = k_means(TRAIN, clusters)
    log.clear()
    found = k_means(TRAIN.to("cuda"), clusters)
    centres = [torch.stack([TRAIN[own == group].mean(0) for group in own.unique()]) for own in (found, expected)]
    spread = [torch.cdist(TRAIN, own).amin(1).square().sum().item() for own in centres]
    assert spread[0] == pytest.approx(spread[1], rel=0.03, abs=1e-2)
    if clusters <= 5:
        assert normalized_mutual_info_score(found, expected) > 0.99
    # One for each step of each start.
    assert log.waits.total() < 10 * 300


def test_k_means_on_a_gpu_leaves_no_cluster_empty_where_rows_differ(log: Log) -> None:
    rows = torch.arange(12.0).repeat(2)[:, None].to("cuda")
    assert len(k_means(rows, 12).unique()) == 12
    assert len(k_means(rows * 0, 3).unique()) <= 3


def test_the_probe_leaves_a_gpu_without_room_for_it_and_no_cpu(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear(TRAIN, TRAIN_LABELS, TEST, CLASSES, LinearSettings())
    assert not log.launches
    given = TRAIN.to("cuda"), TRAIN_LABELS, TEST.to("cuda"), CLASSES, LinearSettings()
    monkeypatch.setattr(hardware, "free", lambda gpu: 1 << 30)
    log.clear()
    found = linear(*given)
    assert log.launches.total() <= 2
    assert torch.equal(found.predictions, expected.predictions)
