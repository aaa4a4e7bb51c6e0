"""Numbers without bounds, giants, metadata of any type and pipes for files end in a sentence, and soon."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_links import MEASURED, SMALL

from manyviews import cli
from manyviews.config import Settings, keys, load
from manyviews.encoder.backbone import create_backbone
from manyviews.encoder.encoder import EncoderSettings
from manyviews.evaluation import EvaluateSettings
from manyviews.features import limits
from manyviews.features.backbone import open_model, open_run
from manyviews.features.extract import ExtractSettings
from manyviews.recipe import Recipe
from manyviews.run.checkpoints.checkpoint import File, read_manifest
from manyviews.system import hardware
from manyviews.system.console import Console
from manyviews.system.files import sha256
from manyviews.system.launch import start
from manyviews.train.finetune import FinetuneSettings
from manyviews.train.pretrain import train_step
from manyviews.train.setup import make_setup
from small_run import photographs, small_run

NUMBERS = ("1e9", "1e20", "1e308", "-1", "-1e308", "nan", "inf", "1e400")
PAIRS = ("crop_scale", "local_scale", "crop_ratio", "blur_sigma", "erase_scale", "unseen", "classes")
"""Keys whose bounds a validator knows, and classes by their numbers."""
REQUIRED = {ExtractSettings: ["output=x"], Recipe: [], FinetuneSettings: [], EvaluateSettings: []}


def numbers(model: type[Settings]) -> list[Any]:
    """Every key of a number, once for each component that has one of its own, with what it needs."""
    found = [entry for entry in keys(model) if re.search(r"\b(int|float)\b", entry.kind)]
    return [pytest.param(model, entry, id=f"{entry.key} {[need.names[0] for need in entry.needs]}") for entry in found]


EVERY = [entry for model in REQUIRED for entry in numbers(model)]


@pytest.mark.parametrize(("model", "entry"), EVERY)
def test_every_number_has_an_upper_bound(model: type[Settings], entry: Any) -> None:
    wild = re.findall(r"(?:int|float)(?![^,|\]]*(?:≤|<))", entry.kind.replace("| null ", ""))
    assert not wild or entry.key.rpartition(".")[2] in PAIRS, entry.kind


@pytest.mark.parametrize(("model", "entry"), EVERY)
def test_a_number_that_is_out_of_bounds_is_refused_in_a_sentence(model: type[Settings], entry: Any) -> None:
    chosen = [f"{need.field}={need.names[0]}" for need in entry.needs]
    chosen += ["data.path=/images"] if "data=folder" in chosen else []
    if "data=folder" in chosen:
        chosen.remove("data=folder")
        chosen.append("data.name=folder")
    for number in NUMBERS:
        count = len(re.findall(r"\b(?:int|float)\b", entry.kind)) if entry.kind.startswith("[") else 0
        value = f"[{', '.join([number] * count)}]" if count else number
        words = [*REQUIRED[model], *chosen, f"{entry.key}={value}"]
        if number in ("1e9", "1e20") or entry.key in ("unseen", "classes"):
            # Sound, or measured against what it leads to.
            with suppress(ValueError):
                load(model, None, words)
        else:
            with pytest.raises(ValueError, match=f"{entry.key}|{entry.key.rpartition('.')[2]} is ") as refused:
                load(model, None, words)
            assert len(str(refused.value)) < 600


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("made") / "images", 6)


TOO_LARGE = {
    "the 1,000,000,000 rows of 8 numbers that objective=queue keeps.*lower objective.size": ["objective=queue"],
    "that objective=nearest_neighbours keeps": ["objective=nearest_neighbours"],
    r"6 × 256 views of 3 × 4096 × 4096 pixels, by train.batch_size, views.num_views and views.size, take at least "
    "309.24 GB": ["views.num_views=256", "views.size=4096"],
    "the picture of views, for train.preview=256 .* lower it": ["train.preview=256", "views.size=4096"],
    r"the [\d,]+ weights of encoder.name=vit_gigantic_patch14_224": ["encoder.name=vit_gigantic_patch14_224"],
    "its projector and predictor": [
        *("encoder.projector.layers=8", "encoder.projector.hidden=16384", "encoder.projector.dim=16384"),
        *("encoder.predictor.layers=8", "encoder.predictor.hidden=16384"),
    ],
    "objective.negatives=16,777,216 rows of 8 numbers for each image": [
        *("objective=bank", "objective.estimator=nce", "objective.negatives=16777216", "objective.shared=false"),
    ],
    "train.epochs=1e[+]06 is 2,000,000 steps.*at most 1,000": ["train.epochs=1000000"],
}


@pytest.mark.parametrize(("message", "words"), TOO_LARGE.items(), ids=[" ".join(words) for words in TOO_LARGE.values()])
def test_what_cannot_fit_is_refused_before_it_is_built(
    message: str, words: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = 4 if "picture" in message else 1 if "negatives" in message else 8
    monkeypatch.setattr(hardware, "device", lambda: there * 10**9)
    if "steps" in message:
        monkeypatch.setattr(limits, "MOST_STEPS", 1000)
    size = ["objective.size=1000000000"] if "keeps" in message else []
    given = [f"data={images}", f"output={tmp_path / 'run'}", *SMALL, "train.batch_size=6", *words, *size]
    recipe = load(Recipe, None, list({word.partition("=")[0]: word for word in given}.values()))
    with pytest.raises(ValueError, match=message):
        make_setup(recipe, start(6, "fp32", 1), tmp_path / "run", Console(quiet=True), train_step)
    assert not (tmp_path / "run").exists()


def test_what_is_counted_without_memory_is_what_is_built() -> None:
    settings = EncoderSettings(name="resnet18")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    counted = limits.weight_count(lambda: settings.build(channels=3, size=32))
    assert torch.equal(torch.get_rng_state(), before)
    assert counted == sum(parameter.numel() for parameter in settings.build(channels=3, size=32).parameters())


def test_memory_that_runs_out_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(cli, "pretrain_recipe", full)
    assert cli.pretrain(["quickstart"]) == 2
    assert "error: memory ran out: " in capsys.readouterr().err


@pytest.mark.parametrize("giant", ["vit_gigantic_patch14_224", "convnext_xxlarge"])
def test_a_giant_beside_small_weights_is_refused_before_it_is_built(
    giant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path / "run")
    config, recipe = tmp_path / "run/backbone/config.json", tmp_path / "run/config.yaml"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": giant}))
    recipe.write_text(recipe.read_text().replace("name: light_resnet", f"name: {giant}", 1))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)
    name = f"local-dir:{config.parent}"
    words = r"describes a model of [\d,]+ weights, and those beside it have 1,11\d,\d\d\d bytes"
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=words):
            create_backbone(name, channels=3, size=224, pretrained=pretrained)
        with pytest.raises(ValueError, match=words):
            open_model(name, pretrained=pretrained)
    with pytest.raises(ValueError, match=words):
        open_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/backbone")
    with pytest.raises(ValueError, match=r"describes a model of [\d,]+ weights"):
        open_run(tmp_path / "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run that has come to its end and was evaluated."""
    run = tmp_path_factory.mktemp("made") / "run"
    assert cli.pretrain(["quickstart", f"data={images}", f"output={run}", *SMALL, "train.epochs=2"]) == 0
    assert cli.evaluate([str(run), *MEASURED, "report=false"]) == 0
    return run


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises where what is done takes longer, as waiting for a pipe would."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resume(run: Path, images: Path) -> int:
    """Goes on with a run, which has not come to its end then."""
    (run / "done").unlink(missing_ok=True)
    return cli.pretrain(["quickstart", f"data={images}", f"output={run}", *SMALL, "train.epochs=2", "resume=true"])


PIPES = {
    "metrics.jsonl": (2, 0),
    "config.yaml": (2, 2),
    ".lock": (2, 0),
    "images.jsonl": (0, 0),
    "unreadable.txt": (0, 0),
    "evaluation.json": (0, 0),
    "outcomes.safetensors": (0, 0),
    "backbone/model.safetensors": (0, 0),
    "backbone/config.json": (0, 2),
    "checkpoints/step-000000002/manifest.json": (0, 0),
    "checkpoints/step-000000002/encoder.safetensors": (0, 0),
}


@pytest.mark.parametrize(("name", "codes"), PIPES.items(), ids=PIPES)
def test_a_pipe_for_a_file_of_a_run_neither_hangs_nor_ends_in_a_traceback(
    name: str, codes: tuple[int, int], made: Path, images: Path, tmp_path: Path
) -> None:
    for work, code in zip(("resume", "evaluate"), codes, strict=True):
        run = shutil.copytree(made, tmp_path / work)
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        with within(100):
            found = resume(run, images) if work == "resume" else cli.evaluate([str(run), *MEASURED, "report=false"])
        assert found == code, work


def reseal(folder: Path, **metadata: Any) -> None:
    """Other metadata in a checkpoint, as one who knows how a manifest is sealed writes them."""
    manifest = read_manifest(folder)
    text = manifest.model_copy(update={"metadata": {**manifest.metadata, **metadata}}).text()
    (folder / "manifest.json").write_text(text)


FACTS = ("losses", "skipped", "cut_off", "images", "channels", "held_out", "score", "recipe", "seconds", "scaler")
WRONG = {"NaN": math.nan, "text": "x\x1b[31m", "list": [1, "x"], "1e30": 1e30, "-1": -1, "deep": {"a": {"b": [None]}}}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_of_another_type_ends_in_a_sentence(
    fact: str, made: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (WRONG | ({"empty": {"loss": []}} if fact == "losses" else {})).items():
        run = shutil.copytree(made, tmp_path / f"{name}")
        for folder in (run / "checkpoints").iterdir():
            reseal(folder, **{fact: value})
        capsys.readouterr()
        found = resume(run, images)
        said = capsys.readouterr().err
        assert found == 2 or (fact, name) in {("score", "1e30"), ("score", "-1"), ("held_out", "text")}, (name, said)
        assert not found or said.startswith("error: ")
        assert "\x1b" not in said
        if fact == "channels":
            shutil.rmtree(run / "backbone")
            assert cli.evaluate([str(run), *MEASURED, "report=false"]) == 2


def test_a_recipe_in_the_facts_without_a_budget_ends_in_a_sentence(made: Path, images: Path, tmp_path: Path) -> None:
    for name, train in (("missing", {}), ("text", {"epochs": "x"}), ("huge", {"epochs": 1e308}), ("null", None)):
        run = shutil.copytree(made, tmp_path / name)
        for folder in (run / "checkpoints").iterdir():
            metadata = read_manifest(folder).metadata
            recipe = metadata["recipe"]
            assert isinstance(recipe, dict)
            own = recipe["train"]
            assert isinstance(own, dict)
            kept = {key: value for key, value in own.items() if key not in ("epochs", "minutes")}
            reseal(folder, recipe={**recipe, "train": train if train is None else {**kept, **train}})
        assert resume(run, images) == 2


def test_an_optimiser_of_a_stranger_brings_no_settings_of_its_own(made: Path, images: Path, tmp_path: Path) -> None:
    sound = shutil.copytree(made, tmp_path / "sound")
    assert resume(sound, images) == 0
    wrongs = {"betas": "x", "weight_decay": 1e30, "lr": [], "eps": None, "fused": "yes", "more": 1}
    changed = shutil.copytree(made, tmp_path / "changed")
    for folder in (changed / "checkpoints").iterdir():
        file = folder / "optimiser.json"
        content = json.loads(file.read_text())
        for group in content["param_groups"]:
            group.update(wrongs)
        file.write_text(json.dumps(content))
        manifest = read_manifest(folder)
        files = {**manifest.files, file.name: File(bytes=file.stat().st_size, sha256=sha256(file))}
        (folder / "manifest.json").write_text(manifest.model_copy(update={"files": files}).text())
    assert resume(changed, images) == 0
    weights = [(run / "backbone/model.safetensors").read_bytes() for run in (sound, changed)]
    assert weights[0] == weights[1]
