"""Methods side by side: what is called what, what is said of it, and what is written."""

import json
from typing import get_args

import pytest
import torch

from manyviews.evaluation.method_rows import methods
from manyviews.evaluators.results.intervals import bootstrap_differences
from manyviews.evaluators.results.measurement import TITLES, Evaluation, Measurement, Task
from manyviews.evaluators.results.side_by_side import Comparison, Overlap, Row, by_title, differences, spread_of
from recorded import printed_text

QUEUE = {"objective": {"name": "queue", "temperature": 0.2}, "train": {"epochs": 100}}
BATCH = {"objective": {"name": "in_batch", "temperature": 0.1}, "train": {"epochs": 100}}
LONGER = {"objective": {"name": "queue", "temperature": 0.2}, "train": {"epochs": 800}}
OTHER = {"objective": {"name": "queue", "temperature": 0.2}, "train": {"epochs": 9, "chunk": 4, "images_per_class": 2}}


@pytest.mark.parametrize(
    ("recipes", "folders", "expected"),
    [
        ([QUEUE, BATCH, QUEUE], ["a", "b", "c"], {"objective=queue": [0, 2], "objective=in_batch": [1]}),
        ([QUEUE, LONGER], ["a", "b"], {"train.epochs=100": [0], "train.epochs=800": [1]}),
        ([QUEUE, QUEUE], ["runs/moco-0", "runs/moco-1"], {"moco": [0, 1]}),
        ([QUEUE, QUEUE], ["runs/a", "runs/b"], {"runs/a": [0, 1]}),
        ([QUEUE, OTHER], ["runs/plain", "runs/chunked"], {"plain": [0], "chunked": [1]}),
        ([QUEUE, OTHER], ["first/run", "second/run"], {"first/run": [0], "second/run": [1]}),
    ],
)
def test_runs_with_equal_recipes_are_one_method_named_by_what_differs_or_by_its_folders(
    recipes: list[dict[str, dict[str, object]]], folders: list[str], expected: dict[str, list[int]]
):
    if OTHER in recipes:
        # Too much differs for a name.
        recipes = [{**recipe, "data": {"path": 30 * str(place)}} for place, recipe in enumerate(recipes)]
    assert methods(recipes, folders) == expected


def row(name: str, share: float, runs: int = 1, *, baseline: bool = False) -> Row:
    hits = torch.rand(runs, 400, generator=torch.Generator().manual_seed(3)) < share
    names = tuple(f"runs/{name}-{number}" for number in range(runs))
    return Row(name, names, tuple(range(runs)), measured(hits.double().mean(1).tolist()), baseline, {"knn": hits})


def measured(accuracies: list[float]) -> dict[str, tuple[Measurement, ...]]:
    """What runs of these accuracies scored, and how their features lie."""
    each = {
        "kNN": [Measurement("knn", "learned", "accuracy", value) for value in accuracies],
        "AMI": [Measurement("clustering", "learned", "AMI", 0.5) for _ in accuracies],
    }
    lying = {"effective rank": 20.0, "uniformity": -2.5, "alignment": 0.5}
    for name, value in lying.items():
        each[name] = [
            Measurement("geometry", "learned", name, value + number * (name == "effective rank"), n=400, dim=64)
            for number in range(len(accuracies))
        ]
    return {title: tuple(own) for title, own in each.items()}


def compared() -> Comparison:
    rows = (row("in_batch", 0.6, 2), row("queue", 0.9, 3), row("raw pixels", 0.3, baseline=True))
    overlaps = (Overlap("in_batch", "in_batch", 0.625), Overlap("in_batch", "queue", 0.25))
    return Comparison(rows, differences(rows, seed=0), 400, overlaps, 10, ("one of them has not finished",))


def test_differences_are_those_of_the_bootstrap_from_the_first_row():
    comparison = compared()
    expected = bootstrap_differences([row.hits["knn"] for row in comparison.rows], seed=0)
    assert [(own.difference, own.low, own.high) for own in comparison.differences] == expected
    assert [(own.features, own.baseline) for own in comparison.differences] == [
        ("queue", "in_batch"),
        ("raw pixels", "in_batch"),
    ]
    assert comparison.verdict().startswith("By kNN, features of queue beat in_batch by ")
    assert "raw pixels" not in comparison.verdict()


def test_tables_show_means_spreads_and_intervals_in_80_columns():
    comparison = compared()
    shown = printed_text(comparison.tables())
    queue, difference = comparison.rows[1], comparison.differences[0]
    assert spread_of([100 * value for value in queue.values("kNN")]) in shown
    assert f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}" in shown
    for text in ("21.0 ± 1.0", "-2.50 ± 0.00", "62.5", "25.0", "by chance 2.5"):
        assert text in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())


def test_the_record_is_json_with_each_run_by_itself():
    comparison = compared()
    record = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert record["rows"][1]["values"]["kNN"] == comparison.rows[1].values("kNN")
    assert record["rows"][1]["runs"] == ["runs/queue-0", "runs/queue-1", "runs/queue-2"]
    assert record["rows"][0]["values"]["effective rank"] == [20, 21]
    assert "hits" not in record["rows"][0]
    assert record["overlaps"][1] == {"first": "in_batch", "second": "queue", "share": 0.25}
    assert record["notes"] == ["one of them has not finished"]


def test_geometry_alone_claims_nothing():
    lying = {"effective rank": (Measurement("geometry", "learned", "effective rank", 3.0, n=9, dim=4),)}
    rows = tuple(Row(name, (name,), (0,), lying) for name in ("a", "b"))
    comparison = Comparison(rows, differences(rows, seed=0), 9)
    assert [str(table.title).split()[0] for table in comparison.tables()] == ["Geometry"]
    assert "no ranking is claimed" in comparison.verdict()


def test_of_each_task_asked_for_the_leading_metric_stands_by_its_title():
    rows = [("knn", "learned", "accuracy", 0.5), ("knn", "raw pixels", "accuracy", 0.1)]
    rows += [("knn", "learned", "balanced accuracy", 0.4), ("fractions", "learned", "1 %", 0.3)]
    rows += [("retrieval", "learned", "Recall@1", 0.7), ("retrieval", "learned", "MAP@R", 0.2)]
    rows += [("geometry", "learned", "uniformity", -2.0)]
    actual = Evaluation(tuple(Measurement(*row) for row in rows))

    def values(*tasks: str) -> dict[str, float]:
        return {title: own.value for title, own in by_title(actual, "learned", tasks).items()}

    assert values("knn", "fractions", "retrieval") == {"kNN": 0.5, "1 %": 0.3, "Recall@1": 0.7}
    assert values("linear", "geometry") == {"uniformity": -2.0}
    assert by_title(Evaluation(), "learned", ("knn",)) == {}


def test_every_task_has_its_title():
    assert (*TITLES, "fractions") == get_args(Task)


def test_a_single_value_has_no_spread():
    assert spread_of([93.14]) == "93.1"
    assert spread_of([1.0, 3.0], digits=2) == "2.00 ± 1.41"
