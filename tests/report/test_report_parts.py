import io
import math
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manyviews.data import InMemory
from manyviews.evaluators.confusion import as_pixels, confusion_picture
from manyviews.evaluators.sampling import sampling_figures
from manyviews.objectives.mining import SemiHard
from manyviews.report import write_report
from manyviews.report.contents import contents_of, count_confusions, look_alikes, look_up, queries, similarities
from manyviews.report.findings import Findings, drawn
from manyviews.report.history import in_words
from manyviews.report.pictures import hover_map, sprite, thumbnails
from manyviews.report.plots import PALETTE, as_svg, curves, histogram, thin
from manyviews.report.sampling import read_sampling, shares_figure
from manyviews.report.tensorboard import neighbour_rows, write_tensorboard
from manyviews.views import ViewsSettings
from report_findings import features, findings, images, run_folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return findings(tmp_path_factory.mktemp("parts") / "run")


def test_neighbours_are_the_training_images_of_the_largest_cosine(given: Findings) -> None:
    train, shown = given.features["learned"]
    assert train is not None
    ids = torch.tensor([5, 0, 33])
    for query, index in zip(look_up(given, ids), ids.tolist(), strict=True):
        cosines = [
            float(torch.dot(shown[index].double(), row) / shown[index].double().norm() / row.norm())
            for row in train.double()
        ]
        order = sorted(range(len(cosines)), key=lambda other: -cosines[other])[:8]
        assert [near.id for near in query.near] == order
        assert [near.cosine for near in query.near] == pytest.approx([cosines[other] for other in order], abs=1e-6)
        assert [near.right for near in query.near] == [other % 3 == index % 3 for other in order]


def test_wrong_queries_are_those_that_knn_got_wrong(given: Findings) -> None:
    hits, guesses = given.evaluation.hits["knn/learned"], given.evaluation.predictions["knn/learned"]
    random, wrong = queries(given, 0)
    assert len(random) == 6
    assert len(wrong) > 0
    assert all(hits[query.id] == 0 and query.prediction == guesses[query.id] for query in wrong)
    assert not {query.id for query in random} & {query.id for query in wrong}
    assert queries(given, 0) == (random, wrong)
    assert queries(given, 1)[0] != random


def test_look_alikes_are_mistakes_beside_their_nearest_image_of_another_class(given: Findings) -> None:
    actual = look_alikes(given, 0)
    cosines = [query.near[0].cosine for query in actual]
    assert cosines == sorted(cosines, reverse=True)
    for query in actual:
        assert given.evaluation.hits["linear/learned"][query.id] == 0
        assert query.near[0].label != query.label


def test_images_without_a_class_are_neither_right_nor_wrong(given: Findings) -> None:
    assert isinstance(given.test, InMemory)
    nameless = InMemory(given.test.pixels, given.test.names, torch.full((60,), -1), given.test.classes, "0" * 64)
    (query,) = look_up(given._replace(test=nameless), torch.tensor([3]))
    assert {near.right for near in query.near} == {None}


def test_confusions_are_counted_as_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (300,), generator=generator)
    guesses = torch.where(torch.rand(300, generator=generator) < 0.6, labels, torch.randint(0, 5, (300,)))
    actual = count_confusions("kNN", labels, guesses)
    assert actual is not None
    assert actual.counts is not None
    by_hand: dict[tuple[int, int], list[int]] = {}
    for index, (truth, guess) in enumerate(zip(labels.tolist(), guesses.tolist(), strict=True)):
        if truth >= 0 and guess >= 0:
            by_hand.setdefault((truth, guess), []).append(index)
    assert actual.counts.tolist() == [[len(by_hand.get((row, column), [])) for column in range(5)] for row in range(5)]
    assert actual.total == sum(map(len, by_hand.values()))
    assert actual.right == sum(len(by_hand[number, number]) for number in range(5))
    for pair in actual.worst:
        own = by_hand[pair.truth, pair.prediction]
        assert (pair.images, list(pair.examples)) == (len(own), own[:4])
        assert pair.share == len(own) / int((labels == pair.truth)[guesses >= 0].sum())
    numbers = [pair.images for pair in actual.worst]
    assert numbers == sorted((len(own) for key, own in by_hand.items() if key[0] != key[1]), reverse=True)[:12]
    assert count_confusions("kNN", torch.tensor([-1]), torch.tensor([0])) is None


def test_more_classes_than_can_be_read_have_no_matrix() -> None:
    labels = torch.arange(21)
    actual = count_confusions("kNN", labels, labels)
    assert actual is not None
    assert actual.counts is None
    assert actual.worst == ()


def test_pairs_are_of_what_they_are_called_and_of_no_image_with_itself() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, -1])
    # Orthogonal images: the cosine is 1 for an image beside itself only.
    actual = similarities(torch.eye(7), labels, 0)
    assert set(actual) == {"same class", "different classes"}
    assert all(bool((cosines == 0).all()) for cosines in actual.values())
    by_class = similarities(torch.nn.functional.one_hot(labels.clamp(min=0)).float(), labels, 0)
    assert bool((by_class["same class"] == 1).all())
    assert bool((by_class["different classes"] == 0).all())
    assert len(by_class["same class"]) == 8000


def test_every_other_image_of_a_class_is_drawn_equally_often() -> None:
    angles = torch.tensor([0.0, 0.3, 1.0])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    cosines = similarities(rows, torch.zeros(3, dtype=torch.int64), 0, pairs=30_000)["same class"]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        share = (cosines - math.cos(angles[second] - angles[first])).abs() < 1e-3
        assert share.double().mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_without_labels_any_two_images_are_a_pair_and_one_image_is_none() -> None:
    assert set(similarities(torch.eye(4), None, 0)) == {"two images"}
    assert similarities(torch.eye(1), None, 0) == {}
    assert set(similarities(torch.eye(2), torch.tensor([0, 1]), 0)) == {"different classes"}


def test_a_long_curve_is_thinned_to_the_mean_and_the_ends_of_each_stretch() -> None:
    values = [float(number % 10) for number in range(3000)]
    values[5] = math.nan
    seen = thin([float(step) for step in range(3000)], values, most=300)
    assert len(seen.steps) == 300
    assert seen.mean[0] == pytest.approx((45 - 5) / 9)
    assert (seen.low[1], seen.mean[1], seen.high[1], seen.steps[1]) == (0, 4.5, 9, 14.5)
    assert np.isnan(thin([1.0], [math.inf]).mean).all()
    assert len(thin([], []).steps) == 0


def inked(pixels: torch.Tensor) -> torch.Tensor:
    """Where a picture is not white: [height, width]."""
    return (pixels < 250).any(0)


@pytest.mark.parametrize("values", [(0.000125, 0.000165), (123_400.0, 123_850.0), (-0.00212, -0.00209), (3.0, 4.0)])
def test_the_numbers_beside_a_curve_are_within_the_picture(values: tuple[float, float]) -> None:
    pixels = as_pixels(curves({"rate": (np.arange(40.0).tolist(), np.linspace(*values, 40).tolist())}))
    edge = inked(pixels)
    assert not edge[:, 0].any()
    assert not edge[:, -1].any()


@pytest.mark.parametrize("length", [1, 20, 200])
def test_a_matrix_of_long_names_keeps_its_fields(length: int) -> None:
    counts = torch.eye(5, dtype=torch.int64) * 9
    picture = inked(confusion_picture(counts, ["w" * length] * 5))
    # The fields of the diagonal are the darkest: they take more of the picture than any letters.
    assert picture.double().mean() > 0.05
    assert not picture[:, 0].any()
    assert not picture[0].any()


def test_a_plot_takes_its_colours_from_the_page_and_is_the_same_every_time() -> None:
    lines = {"loss": ([1.0, 2.0], [3.0, math.nan]), "ceiling": ([1.0, 2.0], [5.0, 5.0])}
    svg = as_svg(curves(lines), "loss")
    assert svg == as_svg(curves(lines), "loss")
    assert svg.startswith("<svg ")
    assert 'class="plot"' in svg.partition(">")[0]
    assert "var(--first)" in svg
    assert "<style" not in svg
    assert "#2f6fb5" not in svg


def test_equal_features_make_a_histogram_too() -> None:
    figure = histogram({"two images": torch.full((10,), 1.0000001)}, ("two views", 1.0))
    assert as_pixels(figure).float().std() > 0


def test_a_sprite_has_every_picture_at_its_place() -> None:
    pictures = torch.arange(7, dtype=torch.uint8).mul(30)[:, None, None, None].expand(7, 3, 20, 20).contiguous()
    made = sprite(pictures)
    assert (made.columns, made.tile, made.side) == (3, 24, 20)
    sheet = np.asarray(Image.open(io.BytesIO(b64decode(made.uri.partition(",")[2]))))
    assert sheet.shape == (72, 72, 3)
    for number in range(7):
        top, left = 24 * (number // 3), 24 * (number % 3)
        assert abs(sheet[top + 8, left + 8].astype(int) - 30 * number).max() <= 3


def test_thumbnails_are_made_smaller_and_never_larger() -> None:
    small, large = images(3, ("a",), size=12), images(3, ("a",), channels=3, size=100)
    assert torch.equal(thumbnails(small, torch.tensor([2, 0]), 32), small.pixels[[2, 0]])
    made = thumbnails(large, torch.tensor([1]), 25)
    assert made.shape == (1, 3, 25, 25)
    assert made.float().mean() == pytest.approx(large.pixels[1].float().mean().item(), abs=1)


def test_the_largest_classes_have_a_colour_each_and_the_others_share_one(tmp_path: Path) -> None:
    names = tuple(f"c{number}" for number in range(14))
    test = images(150, names)
    rows = features(test, noise=0.1)
    points = {"pca": (torch.arange(150), rows[:, :2])}
    made = hover_map(Findings(run_folder(tmp_path / "run"), test, None, {"learned": (None, rows)}, points=points), 0)
    assert made is not None
    assert [group.name for group in made.groups] == [*(f"c{number}" for number in range(11)), "3 more classes"]
    assert sum(group.images for group in made.groups) == 150
    assert len({group.colour for group in made.groups}) == 12 == len(PALETTE)
    assert [made.data["group"][index] for index in (0, 10, 11, 13, 14)] == [0, 10, 11, 11, 0]


def test_what_differs_from_the_defaults_is_told_in_words() -> None:
    assert in_words(ViewsSettings()) == ""
    assert (
        in_words(ViewsSettings(crop_scale=(0.5, 1.0), clip=False, blur=0.5)) == "crop scale 0.5 to 1, no clip, blur 0.5"
    )


def test_what_is_drawn_depends_on_the_id_and_the_key_alone() -> None:
    most = drawn(torch.arange(100), 100, 1)
    few = drawn(torch.arange(0, 100, 2), 10, 1)
    assert [index for index in most.tolist() if index % 2 == 0][:10] == few.tolist()
    assert drawn(torch.arange(100), 100, 2).tolist() != most.tolist()


def test_tensorboard_has_the_same_pictures_once(given: Findings) -> None:
    folder = given.folder / "tensorboard" / "evaluation"
    contents = contents_of(given, 0)
    for _ in range(2):
        write_tensorboard(given, contents, 0, folder.parent)
    assert len(list(folder.glob("events*"))) == 1
    written = EventAccumulator(str(folder), size_guidance={"images": 0})
    written.Reload()
    tags = {"neighbours/drawn at random", "neighbours/wrong", "neighbours/mistakes alike", "map/PCA", "map/t-SNE"}
    assert set(written.Tags()["images"]) == tags | {"confusion", "similarities", "verification/ROC curves"}
    encoded = written.Images("neighbours/drawn at random")[0]
    assert (encoded.width, encoded.height) == (9 * 76, 6 * 76)


def test_the_projector_has_embeddings_classes_names_and_pictures(given: Findings) -> None:
    write_tensorboard(given, contents_of(given, 0), 0, given.folder / "tensorboard")
    (folder,) = (given.folder / "tensorboard" / "evaluation").glob("00000/*")
    embeddings = np.loadtxt(folder / "tensors.tsv")
    shown = given.features["learned"][1].double()
    assert embeddings == pytest.approx((shown / shown.norm(dim=1, keepdim=True)).numpy(), abs=1e-4)
    lines = (folder / "metadata.tsv").read_text().splitlines()
    assert lines[:3] == ["class\timage", "boot\t1/picture 0000.png", "coat\t1/picture 0001.png"]
    assert len(lines) == 61
    with Image.open(folder / "sprite.png") as sheet:
        assert sheet.size == (8 * 12, 8 * 12)


def test_frames_in_tensorboard_differ_by_more_than_colour(given: Findings) -> None:
    _, wrong = queries(given, 0)
    picture = neighbour_rows(given, wrong).float()
    kinds: dict[bool | None, set[int]] = {}
    for row, query in enumerate(wrong):
        for column, near in enumerate(query.near, 1):
            edge = picture[:, 76 * row, 76 * column : 76 * (column + 1)]
            kinds.setdefault(near.right, set()).add(int((edge.mean(0) < 250).sum()))
    assert kinds[True] == {76}
    assert max(kinds[False]) < 45


def test_shares_are_stacked_to_one_over_the_steps_that_have_them() -> None:
    lines = [{"step": step, "easy": 0.5, "semi_hard": 0.3, "hard": 0.2} for step in (1.0, 2.0, 3.0)]
    lines.insert(1, {"step": 1.5, "easy": math.nan, "semi_hard": 0.3, "hard": 0.2})
    figure = shares_figure(lines)
    assert figure is not None
    polygons = figure.axes[0].collections
    tops = [float(own.get_paths()[0].vertices[:, 1].max()) for own in polygons]
    assert tops == pytest.approx([0.5, 0.8, 1.0])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["hard", "semi-hard", "easy"]
    assert figure.axes[0].get_xlim() == (1, 3)
    assert shares_figure(lines[:1]) is not None
    assert shares_figure([{"step": 1.0, "loss": 2.0}]) is None


def test_a_run_that_samples_has_a_section_and_pictures_and_damaged_figures_are_left_out(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    page = write_report(given).read_text()
    assert 'id="sampling"' not in page
    rows, ids = features(images(40, ("a", "b")), noise=0.6)[None], torch.arange(40) % 2
    measured = sampling_figures(rows, ids, SemiHard(), normalized=True, seed=0, step=0)
    (given.folder / "sampling.json").write_text(measured.model_dump_json())
    page = write_report(given).read_text()
    assert 'href="#sampling"' in page
    assert page.count("this run: semi-hard") == 1
    events = EventAccumulator(str(given.folder / "tensorboard" / "evaluation"), size_guidance={"images": 0})
    events.Reload()
    assert "sampling/distances" in events.Tags()["images"]
    (given.folder / "sampling.json").write_text(measured.model_dump_json().replace("semi_hard", "$bad$"))
    assert read_sampling(given.folder) is None
