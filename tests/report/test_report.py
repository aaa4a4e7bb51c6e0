import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from manyviews.data import InMemory
from manyviews.evaluators.compare import compare
from manyviews.evaluators.results.measurement import label
from manyviews.report import Findings, plots, write_report
from manyviews.report.contents import queries
from report_findings import features, findings, images, run_folder

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }} $x^2$ $\\frac",
    "<!-- ]]> ' & \u2028",
    "broken \udcff name\x00\t",
)
VOID = {"meta", "link", "img", "br", "line", "rect", "circle", "path", "use", "input"}


class Page(HTMLParser):
    """A page as its elements: their attributes, and the tables as rows of words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag) if tag not in VOID else None
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        elif not self._open or self._open[-1] != "style":
            self.text += data
            if "table" in self._open and ("td" in self._open or "th" in self._open):
                self.tables[-1][-1][-1] += data

    def sections(self) -> set[str]:
        return {attributes["id"] or "" for tag, attributes in self.elements if tag == "section"}

    def map_data(self) -> dict[str, object]:
        actual = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(actual[0])


def report(given: Findings) -> Page:
    page = Page(write_report(given).read_text())
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {f"#{section}" for section in page.sections()}
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Page]:
    given = findings(tmp_path_factory.mktemp("report") / "run", curves=True)
    return given, report(given)


def test_every_score_of_the_evaluation_stands_in_the_score_table(made: tuple[Findings, Page]) -> None:
    given, page = made
    table = next(table for table in page.tables if "kNN" in table[0])
    assert [cell.strip() for cell in table[0]] == ["features", "dim", "kNN", "linear probe"]
    rows = {row[0].strip(): row for row in table[1:]}
    for score in given.evaluation.of("knn", "linear"):
        parts = rows[label(score.features)][{"knn": 2, "linear": 3}[score.task]].split(maxsplit=2)
        assert parts[0] == f"{100 * score.value:.1f}"
        assert score.low is not None
        assert score.high is not None
        assert parts[1] == f"{100 * score.low:.1f}–{100 * score.high:.1f}"
        assert parts[2].strip() == score.choice
    assert list(rows) == ["learned (backbone)", "raw pixels"]


def test_every_figure_of_the_other_tasks_stands_in_its_table(made: tuple[Findings, Page]) -> None:
    given, page = made
    for task in ("retrieval", "clustering", "verification"):
        for kind in given.features:
            # A threshold is no share: it stands beside the ROC curve.
            figures = [own for own in given.evaluation.of(task, features=kind) if own.metric != "threshold"]
            head = ["features", *(own.metric for own in figures)]
            table = next(table for table in page.tables if [cell.strip() for cell in table[0]] == head)
            row = next(row for row in table if row[0].strip() == label(kind))
            for own, cell in zip(figures, row[1:], strict=True):
                number, *more = cell.split()
                formats = {"silhouette": f"{own.value:.3f}", "clusters": f"{own.value:.0f}"}
                assert number == formats.get(own.metric, f"{100 * own.value:.1f}")
                assert own.deviation is None or more == ["±", f"{100 * own.deviation:.1f}"]


def test_geometry_fractions_and_staleness_stand_in_their_tables(made: tuple[Findings, Page]) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for table in made[1].tables for row in table]
    assert ["learned (backbone)", "6", "4.2", "-1.50", "0.25"] in rows
    assert ["raw pixels", "6", "5.0", "-1.00", "–"] in rows
    assert ["learned (backbone)", "62.5 ± 17.7"] in rows
    assert ["memory bank", "0.875", "0.250", "0.975"] in rows
    assert "Geometry of the features of 60 images" in made[1].text
    assert "cosines of 90 rows with fresh embeddings" in made[1].text


def test_verdict_command_commit_and_warnings_are_told(made: tuple[Findings, Page]) -> None:
    given, page = made
    text = " ".join(page.text.split())
    for part in re.split("; |: ", given.evaluation.verdict().rstrip(".")):
        assert part in text
    assert "manyviews pretrain quickstart train.epochs=2" in text
    assert "0123abc" in text
    assert "in_batch, temperature 0.15" in text
    assert "the images are of other data than the run's" in text
    assert "1 file that cannot be read was left out" in text
    assert "broken.jpg" in text


def test_the_confusion_matrix_counts_the_linear_probes_predictions(made: tuple[Findings, Page]) -> None:
    given, page = made
    table = next(table for table in page.tables if table[0] == ["", "boot", "coat", "dress"])
    assert given.test is not None
    assert given.test.labels is not None
    guesses = given.evaluation.predictions["linear/learned"]
    for truth, row in enumerate(table[1:]):
        for guess, cell in enumerate(row[1:]):
            count = int(((given.test.labels == truth) & (guesses == guess)).sum())
            assert cell == (str(count) if count else "")


def test_all_that_the_page_loads_is_in_it(made: tuple[Findings, Page]) -> None:
    given, page = made
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value[:80])
    policy = next(
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    assert (given.folder / "report.html").stat().st_size < 1_000_000


def test_there_is_a_section_for_everything_there_is(made: tuple[Findings, Page]) -> None:
    assert len(made[1].sections()) == 11


def test_the_same_findings_make_the_same_page(made: tuple[Findings, Page]) -> None:
    first = (made[0].folder / "report.html").read_bytes()
    assert write_report(made[0]).read_bytes() == first


def test_what_people_have_named_is_only_text(tmp_path: Path) -> None:
    given = findings(tmp_path / "run", HOSTILE)
    assert isinstance(given.test, InMemory)
    names = [HOSTILE[index % len(HOSTILE)] for index in range(60)]
    named = InMemory(given.test.pixels, names, given.test.labels, given.test.classes, "0" * 64)
    config = given.folder / "config.yaml"
    config.write_text(f"# {' '.join(HOSTILE[:4])}\n# commit {HOSTILE[0]}\n" + config.read_text())
    (given.folder / "unreadable.txt").write_text("".join(f"{text}\t{text}\n" for text in HOSTILE), "utf-8", "replace")
    page = report(given._replace(test=named, warnings=HOSTILE))
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all("alert(1)" not in text for attributes, text in page.scripts if attributes.get("type") is None)
    data = page.map_data()
    spelling = {"\udcff": r"\xff", "\x00": r"\x00", "\t": r"\t", "\u2028": r"\u2028"}
    plain = [text.translate(str.maketrans(spelling)) for text in HOSTILE]
    assert data["classes"] == plain
    assert data["names"] == plain * 10
    assert all(text in page.text for text in plain)


def test_what_a_stranger_wrote_into_a_run_is_only_text(tmp_path: Path) -> None:
    given = findings(tmp_path / HOSTILE[0].replace("/", "∕"))
    lines = [{"step": 1, "loss": 1.0, **dict.fromkeys((*HOSTILE[:5], "\ud800"), 0.5)}, {"step": 2, "huge": 10**400}]
    (given.folder / "metrics.jsonl").write_text(
        "\n".join([*map(json.dumps, lines), "[" * 99_999, '{"step": NaN}', "3"])
    )
    config = (given.folder / "config.yaml").read_text().replace("unseen: []", f"unseen: [{json.dumps(HOSTILE[1])}]")
    (given.folder / "config.yaml").write_text(config)
    (given.folder / "done").write_text(HOSTILE[2] + "\n" * 9)
    (given.folder / "unreadable.txt").write_text(f"{HOSTILE[1]}\t{HOSTILE[2]}\n" + "a" * 5000)
    page = report(given)
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not [tag for tag, attributes in page.elements if tag in ("iframe", "object", "embed", "base", "form")]
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in page.elements)
    assert HOSTILE[1] in page.text


def test_a_picture_of_views_that_is_none_of_a_run_is_left_out(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    with (given.folder / "views.png").open("wb") as file:
        file.truncate(1 << 34)
    assert "views" not in report(given).sections()


def test_metrics_of_very_many_kinds_are_not_all_drawn(tmp_path: Path) -> None:
    metrics = [{"step": 1.0, "loss": 1.0, **{f"x{number}": 1.0 for number in range(5000)}}]
    first, more = plots.panels(metrics)
    assert (len(first), len(more)) == (1, plots.MOST_PANELS)


def test_without_labels_nothing_is_scored_and_the_rest_is_shown(tmp_path: Path) -> None:
    train = images(20, ())
    rows = features(train, noise=0.5)
    points = {"pca": (torch.arange(20), rows[:, :2])}
    given = Findings(run_folder(tmp_path / "run"), train, None, {"learned": (None, rows)}, points=points)
    page = report(given)
    assert page.sections() >= {"neighbours", "map-section", "similarities", "scores"}
    assert "confusion" not in page.sections()
    assert "have no labels" in page.text
    assert not any("right" in (attributes.get("class") or "").split() for _, attributes in page.elements)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_images_are_enough(count: int, tmp_path: Path) -> None:
    train = images(count, ("one",), channels=3, size=150)
    rows = torch.eye(3)[:count]
    given = Findings(run_folder(tmp_path / "run", lines=1), train, train, {"learned": (rows, rows)})
    given = given._replace(points={"pca": (torch.arange(count), rows[:, :2])})
    assert "neighbours" in report(given).sections()


def test_no_image_is_its_own_neighbour(tmp_path: Path) -> None:
    train = images(12, ("a", "b"))
    given = Findings(run_folder(tmp_path / "run"), train, None, {"learned": (None, features(train, noise=0.1))})
    random, _ = queries(given, 0)
    assert all(query.id not in {near.id for near in query.near} for query in random)


def test_a_class_that_only_the_test_images_have_is_named(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    labels = given.shown.labels
    assert labels is not None
    labels[::4] = 3
    labels[1::6] = -1
    train, test = given.features["learned"]
    assert given.train.labels is not None
    evaluation = compare({"learned": (train, test)}, given.train.labels, labels)
    page = report(given._replace(evaluation=evaluation, features={"learned": (train, test)}))
    assert ["", "boot", "coat", "dress", "class 3"] in [table[0] for table in page.tables]


def test_a_thousand_classes_have_a_list_in_place_of_a_matrix(tmp_path: Path) -> None:
    names = tuple(f"class {number:04d}" for number in range(1000))
    train, test = images(3000, names), images(1000, names, seed=1)
    kinds = {"learned": (features(train, noise=1.0), features(test, noise=1.0, seed=1))}
    assert train.labels is not None
    assert test.labels is not None
    evaluation = compare(kinds, train.labels, test.labels, tasks=("knn",))
    points = {"pca": (torch.arange(1000), kinds["learned"][1][:, :2])}
    page = report(Findings(run_folder(tmp_path / "run"), train, test, kinds, evaluation, points=points))
    assert not any("matrix" in (attributes.get("class") or "") for _, attributes in page.elements)
    assert "Most often confused" in page.text
    assert len([1 for tag, _ in page.elements if tag == "option"]) == 1001
    assert "989 more classes" in page.text


def test_metrics_may_be_missing_cut_off_or_not_finite(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    metrics = given.folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": NaN, "knn": 0.5}\n{"step": 3, "lo')
    page = report(given)
    assert "the loss was not finite in 2 of 2 lines" in page.text
    assert "50.0 %" in page.text
    metrics.unlink()
    assert "has written no metrics" in report(given).text


def test_a_collapse_is_told_in_words(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    lines = [{"step": step, "epoch": step / 10, "loss": 5.0, "embedding_std": 0.01} for step in range(1, 21)]
    (given.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "the embeddings have collapsed" in report(given).text


def test_points_that_are_not_finite_are_left_out_of_the_map(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    points = torch.randn(60, 2)
    points[7] = math.nan
    data = report(given._replace(points={"umap": (torch.arange(60), points)})).map_data()
    places = data["maps"]
    assert isinstance(places, list)
    assert [index for index, position in enumerate(places[0]) if position is None] == [7]


def test_a_run_without_a_configuration_has_a_report_too(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    for name in ("config.yaml", "metrics.jsonl", "views.png", "unreadable.txt"):
        (given.folder / name).unlink()
    assert "6 features per image" in report(given).text


def test_features_of_other_images_are_refused(tmp_path: Path) -> None:
    given = findings(tmp_path / "run")
    wrong = {"learned": (None, torch.randn(59, 6))}
    with pytest.raises(ValueError, match="learned: 59 features of shown images, and there are 60"):
        write_report(given._replace(features=wrong))
    with pytest.raises(ValueError, match="the map pca has 3 points for 4 images"):
        write_report(given._replace(points={"pca": (torch.arange(4), torch.randn(3, 2))}))
