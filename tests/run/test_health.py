"""Figures that show a collapse, against their definitions; and warnings that come once, and only where they should."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from manyviews.config import load
from manyviews.encoder.encoder import Embedded, Encoder
from manyviews.engine import normalize
from manyviews.recipe import Recipe
from manyviews.run.folder import read_metrics
from manyviews.run.health import (
    PATIENCE,
    EmbeddingSample,
    Watch,
    effective_rank,
    figures,
    glimpse,
    similarities,
    spread,
    without_repeats,
)
from manyviews.system import distributed
from manyviews.train.pretrain import pretrain
from processes import start

GENERATOR = torch.Generator().manual_seed(0)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def messages_of(embeddings: Tensor, lines: int = PATIENCE, **others: float) -> list[str]:
    """The warnings over some lines of a run that is half over and has these embeddings all the time."""
    watch = Watch(min(embeddings.shape[1:]))
    seen = glimpse(embeddings, torch.arange(embeddings.shape[1]))
    return [text for _ in range(lines) for text in watch.warnings(0.5, 2.0, figures(seen) | others)]


def test_the_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    assert spread(torch.cat([torch.eye(6), -torch.eye(6)])) == pytest.approx(1, abs=1e-12)
    assert spread(normalize(torch.ones(5, 4))) == pytest.approx(0, abs=1e-3)


def test_the_squared_spread_is_one_less_the_mean_similarity_of_all_pairs() -> None:
    unit = normalize(gaussian(20, 3) + 1)
    pairs = [float(a @ b) for a in unit for b in unit]
    assert spread(unit) ** 2 == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-12)
    deviations = [column.std(correction=0).item() for column in unit.T]
    assert spread(unit) == pytest.approx(math.sqrt(sum(value**2 for value in deviations)), abs=1e-12)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (9, 9)])
def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    rows = gaussian(*shape)
    entropy, singular = 0.0, torch.linalg.svdvals(rows)
    for value in singular:
        share = (value / singular.sum()).item()
        entropy -= share * math.log(share)
    assert effective_rank(rows) == pytest.approx(math.exp(entropy), rel=1e-9)
    rotation = torch.linalg.qr(gaussian(shape[1], shape[1])).Q
    assert effective_rank(3 * rows @ rotation) == pytest.approx(effective_rank(rows), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_effective_rank_of_equally_used_directions_is_their_number(rank: int) -> None:
    rows = torch.linalg.qr(gaussian(16, rank)).Q @ torch.linalg.qr(gaussian(12, rank)).Q.T
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-5)
    assert effective_rank(torch.zeros(4, 3)) == 0


def test_a_glimpse_pairs_the_first_view_with_the_last_or_with_the_twins() -> None:
    embeddings, targets, ids = gaussian(3, 4, 5), gaussian(2, 4, 5), torch.tensor([3, 1, 4, 1])
    assert glimpse(embeddings[:1], ids).others is None
    for seen, others in ((glimpse(embeddings, ids), embeddings[2]), (glimpse(embeddings, ids, targets), targets[1])):
        assert seen.others is not None
        torch.testing.assert_close(seen.embeddings, normalize(embeddings[0]))
        torch.testing.assert_close(seen.others, normalize(others))
        assert torch.equal(seen.ids, ids)


@pytest.mark.parametrize("views", [1, 2])
def test_equal_ids_are_positives_and_never_negatives(views: int) -> None:
    embeddings, ids = gaussian(views, 6, 4), torch.tensor([0, 1, 2, 1, 3, 0])
    unit = normalize(embeddings)
    positive, negative = [], []
    for i in range(6):
        for j in range(6):
            if views == 2 or i != j:
                (positive if ids[i] == ids[j] else negative).append(float(unit[0, i] @ unit[-1, j]))
    found = similarities(glimpse(embeddings, ids))
    assert sorted(found["positive"].tolist()) == pytest.approx(sorted(positive), abs=1e-12)
    assert sorted(found["negative"].tolist()) == pytest.approx(sorted(negative), abs=1e-12)


def test_one_view_of_different_images_has_no_positive_pair() -> None:
    assert similarities(glimpse(gaussian(1, 6, 4), torch.arange(6))).keys() == {"negative"}


def test_the_cost_of_a_look_is_bounded() -> None:
    seen = glimpse(gaussian(2, 3000, 2), torch.arange(3000))
    assert seen.embeddings.shape == (512, 2)
    assert sum(len(values) for values in similarities(seen).values()) == 256**2


def test_collapsed_embeddings_are_warned_of_once() -> None:
    (warning,) = messages_of(1 + 0.01 * gaussian(2, 64, 32).abs(), lines=50, effective_rank=9.0)
    assert "similarity of 1.000 on average" in warning
    warnings = messages_of(gaussian(1, 1, 32) + 1e-3 * gaussian(2, 64, 32), lines=50)
    assert len(warnings) == 2
    assert "effective rank is 1." in warnings[1]


def test_embeddings_that_are_all_zero_are_warned_of_once_and_are_one_place() -> None:
    (warning,) = messages_of(torch.zeros(2, 64, 32), lines=50)
    assert warning.startswith("the embeddings are all zero")
    seen = glimpse(torch.zeros(2, 64, 32), torch.arange(64))
    assert figures(seen) == {"embedding_std": 0, "effective_rank": 0}
    assert all((values == 1).all() for values in similarities(seen).values())


def test_embeddings_that_are_tiny_are_not_taken_for_zero() -> None:
    embeddings = gaussian(2, 64, 32)
    seen, tiny = (glimpse(embeddings * scale, torch.arange(64)) for scale in (1, 1e-12))
    assert figures(tiny) == pytest.approx(figures(seen))


def test_embeddings_that_are_not_finite_have_no_figures_and_end_nothing() -> None:
    embeddings = gaussian(2, 8, 4)
    embeddings[:, 3] = math.nan
    assert all(math.isnan(value) for value in figures(glimpse(embeddings, torch.arange(8))).values())
    assert messages_of(embeddings) == []


def test_embeddings_on_one_line_are_warned_of_though_they_are_spread() -> None:
    (warning,) = messages_of(gaussian(2, 64, 1) * gaussian(1, 1, 32))
    assert "effective rank is 1.0 of at most 32" in warning


@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0])
def test_healthy_embeddings_are_not_warned_of(offset: float) -> None:
    # With the largest offset two images have a cosine similarity of 0.96 on average: untrained networks are like that.
    assert messages_of(gaussian(2, 64, 32) + offset) == []


def test_a_low_rank_is_no_fault_where_there_is_room_for_no_more() -> None:
    assert messages_of(torch.eye(2, dtype=torch.float64).repeat(2, 8, 1) + 0.3) == []


def test_a_loss_at_log_n_is_warned_of_once() -> None:
    watch = Watch(32)
    # A tenth of the run, five lines, pass before it is known that the loss rests.
    lines = [watch.warnings(line / 50, 3.0, {"information": 0.01, "ceiling": 5.5}) for line in range(50)]
    assert [number for number, texts in enumerate(lines) if texts] == [5 + PATIENCE - 1]
    assert "0.010 of at most 5.50 nats" in lines[5 + PATIENCE - 1][0]


def test_a_loss_at_log_n_with_embeddings_that_are_all_alike_says_so_and_blames_no_rate() -> None:
    watch, values = Watch(32), {"information": 0.01, "ceiling": 5.5, "embedding_std": 0.003, "effective_rank": 1.0}
    said = [text for line in range(50) for text in watch.warnings(line / 50, 3.0, values)]
    (at_chance,) = (text for text in said if text.startswith("the loss sits at log N"))
    assert "either the images or their views are all alike" in at_chance
    assert "optim.rate" not in at_chance


def test_a_loss_above_log_n_that_falls_is_not_warned_of() -> None:
    # As with a memory bank, whose rows are renewed slowly.
    watch = Watch(32)
    for line in range(50):
        values = {"information": -4 + line / 50, "ceiling": 9.2}
        assert watch.warnings(line / 50, line / 10, values) == []


def told_of_losses(losses: list[float], ceiling: float | None = None) -> list[str]:
    """What is said over a run with these losses, of which the first tenth is its warm-up."""
    watch, said = Watch(32), []
    for line, loss in enumerate(losses):
        values = {"loss": loss}
        if ceiling is not None:
            values |= {"information": ceiling - loss, "ceiling": ceiling}
        said += watch.warnings(line / len(losses), 5 * line / len(losses), values)
    return said


def test_a_loss_that_diverges_is_warned_of_once() -> None:
    (said,) = told_of_losses([5.5] * 5 + [2.0] * 20 + [11.1] * 25, 5.5)
    assert said.startswith("the loss has diverged: it is 11.10, and a guess would give 5.50; try a lower optim.rate")
    (said,) = told_of_losses([5.5] * 5 + [2.0] * 20 + [4.0] * 25, 5.5)
    assert said.startswith("the loss is far above the run's best: it shows 1.50 nats, of 3.50 that it had reached")
    (said,) = told_of_losses([0.9, 0.8, 0.8, 0.7, 0.7] + [0.3] * 20 + [1.9] * 25)
    assert said.startswith("the loss has diverged: it is 1.9, and was at most 0.9 in the warm-up")


@pytest.mark.parametrize(
    ("losses", "ceiling"),
    [
        ([5.5] * 5 + [2.0, 4.5] * 22, 5.5),
        # A queue of random rows is easy at first, until it is filled with embeddings that resemble each other.
        ([0.1, 0.3, 1.0, 3.0, 5.0] + [8.0] * 10 + [7.0 - line / 10 for line in range(35)], 8.3),
        # With semi-hard negatives the loss stays where it is, and may rise as only the hard ones remain.
        ([0.3] * 5 + [0.2] * 20 + [0.35] * 25, None),
        ([-0.3] * 5 + [0.2] * 45, None),
    ],
    ids=["unsteady", "queue", "hard negatives", "below zero"],
)
def test_a_loss_that_rises_without_diverging_is_not_warned_of(losses: list[float], ceiling: float | None) -> None:
    assert [text for text in told_of_losses(losses, ceiling) if "log N" not in text] == []


@pytest.mark.parametrize(
    ("progress", "epoch", "values"),
    [
        (0.05, 2.0, {"information": 0.0, "ceiling": 5.0, "embedding_std": 0.0}),
        (0.3, 2.9, {"information": 0.0, "ceiling": 11.0}),
        (0.9, 9.0, {"information": 1.0, "ceiling": 5.0, "embedding_std": 0.9, "effective_rank": 20.0}),
        (0.9, 9.0, {"loss": 3.0}),
    ],
    ids=["the beginning", "before a bank's rows are renewed", "a healthy run", "nothing to judge by"],
)
def test_nothing_is_said_of(progress: float, epoch: float, values: dict[str, float]) -> None:
    watch = Watch(32)
    watch.warnings(0.0, 0.0, values)
    assert [watch.warnings(progress, epoch, values) for _ in range(20)] == [[]] * 20


def test_a_sign_that_passes_is_not_warned_of() -> None:
    watch = Watch(32)
    for line in range(40):
        assert watch.warnings(0.5, 2.0, {"embedding_std": 0.01 if line % PATIENCE else 0.5}) == []


def look(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    embeddings, ids = torch.randn(2, 7, 5, generator=generator), torch.arange(7)
    own = distributed.share(7)
    seen = glimpse(embeddings[:, own], ids[own])
    torch.save(seen._asdict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_glimpse_is_of_all_processes_and_the_same_on_each(tmp_path: Path) -> None:
    start(look, (str(tmp_path),), count=2)
    generator = torch.Generator().manual_seed(0)
    alone = glimpse(torch.randn(2, 7, 5, generator=generator), torch.arange(7))
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        for name, value in alone._asdict().items():
            torch.testing.assert_close(seen[name], value)


def run(folder: Path, *args: str) -> list[dict[str, float]]:
    """The metrics of a short run."""
    short = "train.batch_size=32 train.log_every=2 train.precision=fp32 train.preview=0 train.monitor=0 train.threads=1"
    args = (*short.split(), f"train.epochs={30 / 312}", f"output={folder}", *args)
    return list(read_metrics(pretrain(load(Recipe, None, args))))


@pytest.mark.parametrize(
    "args",
    [
        ["objective=in_batch"],
        ["objective=queue", "objective.size=80", "objective.momentum=0.9", "encoder.batch_norm_splits=2"],
        ["objective=bank", "objective.estimator=infonce", "objective.negatives=50", "views.num_views=1"],
    ],
    ids=["in_batch", "queue", "bank"],
)
def test_a_healthy_run_shows_its_figures_and_is_not_warned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    lines = run(tmp_path / "run", *args)
    assert "collapsed" not in capsys.readouterr().out
    for line in lines:
        assert 0.1 < line["embedding_std"] < 1
        assert 2 < line["effective_rank"] < 32
        assert line["information"] == pytest.approx(line["ceiling"] - line["loss"], abs=1e-4)
        assert line["ceiling"] == pytest.approx(math.log(1 + line["negatives"]), abs=1e-2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert {"information", "ceiling", "embedding_std", "effective_rank"} <= set(events.Tags()["scalars"])
    kinds = {"similarity/negative"} | ({"similarity/positive"} if "objective=bank" not in args else set())
    assert set(events.Tags()["histograms"]) == kinds
    assert [event.step for event in events.Histograms("similarity/negative")] == [1, 20]
    if "objective=bank" in args:
        assert lines[-1]["staleness"] > lines[0]["staleness"]


def test_a_run_whose_encoder_says_the_same_of_every_image_is_warned_of_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Encoder.forward

    def constant(self: Encoder, views: Tensor) -> Embedded:
        embedded = forward(self, views)
        return Embedded(0 * embedded.embeddings + 1, 0 * embedded.projections + 1)

    monkeypatch.setattr(Encoder, "forward", constant)
    lines = run(tmp_path / "run")
    shown = capsys.readouterr().out
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["ceiling"], abs=1e-4)
    for text in ("the embeddings have collapsed:", "collapsed to a line", "the loss sits at log N"):
        assert shown.count(text) == 1


def test_an_image_that_comes_several_times_counts_once_in_a_sample_without_repeats() -> None:
    sample = EmbeddingSample(torch.eye(5), torch.eye(5) * 2, torch.tensor([7, 3, 7, 9, 3]))
    seen = without_repeats(sample)
    assert seen.ids.tolist() == [3, 7, 9]
    assert torch.equal(seen.embeddings, torch.eye(5)[[1, 0, 3]])
    assert seen.others is not None
    assert torch.equal(seen.others, 2 * torch.eye(5)[[1, 0, 3]])
