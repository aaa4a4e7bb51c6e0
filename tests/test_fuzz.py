"""A little of what `scripts/benchmark.py fuzz` does at length: damaged files are taken or refused in a sentence."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manyviews.config import load
from manyviews.config.yaml_text import parse
from manyviews.encoder.timm_format import read_folder
from manyviews.evaluation import EvaluateSettings
from manyviews.features import store
from manyviews.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from benchmarks import fuzz
from benchmarks.fuzzing.kinds import Kind

EACH = 12
DRAWN = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return fuzz.every(tmp_path_factory.mktemp("sound"))


def test_damaged_files_of_every_kind_are_taken_or_refused_in_a_sentence(every: list[Kind], tmp_path: Path) -> None:
    seen = set()
    for kind in every:
        # A whole run takes a second.
        for number in range(len(kind.samples), len(kind.samples) + (EACH if kind.patience == 1 else EACH // 3)):
            outcome, detail = fuzz.read(kind, fuzz.content_of(kind, number, 1), tmp_path / "one")
            assert outcome in (fuzz.TAKEN, fuzz.REFUSED), f"{kind.name}, input {number}: {detail}"
            seen.add((kind.name, outcome))
    # What lies in a folder's names, or in lines of metrics, is passed over where it is damaged.
    assert len({name for name, outcome in seen if outcome == fuzz.REFUSED}) >= len(every) - 3


def test_sound_files_of_every_kind_are_taken(every: list[Kind], tmp_path: Path) -> None:
    for kind in every:
        outcomes = {fuzz.read(kind, sample, tmp_path / "one")[0] for sample in kind.samples}
        assert fuzz.TAKEN in outcomes, kind.name


def test_a_reader_that_fails_otherwise_is_not_passed_over(tmp_path: Path) -> None:
    def fails(_: Path, __: bytes) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        fuzz.read(Kind("x", 1, text=False, samples=[b""], read=fails), b"", tmp_path / "one")


def test_a_reader_that_does_not_come_back_is_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(_: Path, __: bytes) -> None:
        time.sleep(30)

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    outcome, _ = fuzz.one_of(Kind("x", 1, text=False, samples=[b""], read=waits), b"", tmp_path)
    assert outcome == fuzz.HANG
    assert signal.getsignal(signal.SIGALRM) is before


def refused_or_read(read: Any, *arguments: Any) -> None:
    try:
        read(*arguments)
    except (ValueError, OSError) as problem:
        if not str(problem).strip():
            raise AssertionError("it was refused without a word") from problem


@DRAWN
@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>#'\"?%@`,\n \t0159.e~<\0é\ufeff")), max_size=60))
@example("a: !!python/name:os.system")
def test_any_text_is_yaml_or_refused(text: str) -> None:
    refused_or_read(parse, text)


@DRAWN
@given(JSON)
def test_any_tree_is_a_recipe_or_refused(tmp_path: Path, tree: Any) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps(tree))
    refused_or_read(load, EvaluateSettings, tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text(json.dumps({"train": tree, "data": tree, "seed": tree}))
    refused_or_read(load, Recipe, tmp_path / "x.yaml")


@DRAWN
@given(JSON, JSON)
def test_any_description_of_a_backbone_and_of_features_is_read_or_refused(
    tmp_path: Path, tree: Any, other: Any
) -> None:
    for content in (tree, {"architecture": "resnet18", "pretrained_cfg": tree, "model_args": other}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        refused_or_read(read_folder, tmp_path)
    for content in (tree, {"files": ["backbone.npy"], "layers": tree, "weights": other}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        key = {"weights": {}, "layers": {"backbone": {"file": "backbone.npy", "shape": [1, 1]}}}
        refused_or_read(store.state, tmp_path, key)


@DRAWN
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_every_reader_that_wants_more(
    every: list[Kind], tmp_path: Path, content: bytes
) -> None:
    for kind in every:
        if not kind.text and "image" not in kind.name:
            refused_or_read(fuzz.read, kind, content, tmp_path / "one")
