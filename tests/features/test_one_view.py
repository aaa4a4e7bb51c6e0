"""Training, evaluation, extraction, `Features` and timm agree on what a backbone sees of a photograph."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix

from manyviews import Features, cli
from manyviews.config import load
from manyviews.data.decoding.files import Files
from manyviews.encoder.timm_format import export
from manyviews.features.backbone import PretrainedBackbone, open_model, open_run
from manyviews.features.cached import features_of
from manyviews.features.encoding import EncodeSettings, raw_pixels
from manyviews.recipe import Recipe
from manyviews.report.pictures import thumbnails
from manyviews.system.console import Console
from manyviews.views import StandardView

SHAPES = ((90, 60), (60, 100), (70, 70), (160, 50))
MEAN, STD = (0.45, 0.4, 0.55), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes and four shapes, each smooth noise."""
    root: Path = tmp_path_factory.mktemp("shapes")
    draw = np.random.default_rng(0)
    for number in range(24):
        place = root / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize(SHAPES[number // 2 % 4], Image.Resampling.BICUBIC).save(place / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on these pictures as files, from weights with a mean and deviation of their own."""
    place: Path = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    backbone = timm.create_model("light_resnet", num_classes=0)
    export(backbone, place / "weights", StandardView(32, 3, MEAN, STD).pretrained_cfg)
    words = ["quickstart", f"data={folder}", "data.memory=0", "data.size=24", "data.holdout=0.25", "train.batch_size=8"]
    words += [f"encoder.name=local-dir:{place / 'weights'}", "encoder.pretrained=true", "train.epochs=1"]
    words += ["views.size=32", "views.crop_pct=0.8", "train.minutes=null", "train.monitor=0", "train.workers=1"]
    assert cli.pretrain([*words, f"output={place / 'run'}"]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def opened(run: Path) -> PretrainedBackbone:
    return open_run(run)


@pytest.fixture(scope="module")
def images(opened: PretrainedBackbone) -> Files:
    assert opened.recipe is not None
    images = opened.recipe.data.build().train
    assert isinstance(images, Files)
    return images


def test_pretrained_weights_bring_their_mean_and_deviation(run: Path, opened: PretrainedBackbone) -> None:
    views = load(Recipe, run / "config.yaml").views
    assert (views.mean, views.std, views.crop_pct) == (MEAN, STD, 0.8)
    assert opened.view == StandardView(32, 3, MEAN, STD, crop_pct=0.8)
    exported = open_model(f"local-dir:{run / 'backbone'}", pretrained=True)
    assert exported.view == opened.view
    described = json.loads((run / "backbone" / "config.json").read_text())["pretrained_cfg"]
    assert (described["crop_pct"], described["crop_mode"], described["mean"]) == (0.8, "center", list(MEAN))


def test_evaluation_extraction_features_and_timm_agree(
    run: Path, folder: Path, opened: PretrainedBackbone, images: Files, tmp_path: Path
) -> None:
    evaluated = features_of(opened, images, EncodeSettings(), Console(quiet=True)).numpy()
    assert cli.extract([str(run), f"output={tmp_path / 'out'}", "batch_size=7", "split=train"]) == 0
    extracted = np.load(tmp_path / "out" / "backbone.npy")
    files = [folder / name for name in images.names]
    pictures = [Image.open(file) for file in files]
    kinds: dict[str, Sequence[object]] = {"paths": files, "pictures": pictures}
    kinds["arrays"] = [np.asarray(picture) for picture in pictures]
    given = {name: Features(run).fit().transform(these) for name, these in kinds.items()}
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    with torch.inference_mode():
        timms = backbone(torch.stack([transform(picture) for picture in pictures])).numpy()
    for name, found in {"extract": extracted, **given, "timm": timms}.items():
        np.testing.assert_allclose(found, evaluated, atol=5e-3, err_msg=name)
    assert np.ptp(evaluated, axis=0).max() > 0.1


def test_raw_pixels_and_thumbnails_show_what_the_backbone_sees(opened: PretrainedBackbone, images: Files) -> None:
    view = replace(opened.view, interpolation="bilinear")
    pixels = raw_pixels(images, opened.view).view(len(images), 3, 32, 32)
    small = thumbnails(images, torch.arange(len(images)), 32, opened.view)
    assert torch.equal((255 * pixels).round().byte(), small)
    for index, name in enumerate(images.names[:8]):
        picture = Image.open(images.root / name)
        box = view.boxes(torch.tensor([picture.width / picture.height], dtype=torch.float64))[0]
        edges = (box * torch.tensor([picture.width, picture.height] * 2)).tolist()
        expected = picture.resize((32, 32), Image.Resampling.BILINEAR, box=tuple(edges))
        assert np.abs(np.asarray(expected).transpose(2, 0, 1) - small[index].numpy().astype(int)).max() <= 1


def test_a_run_on_files_is_evaluated_with_crops_and_a_report(run: Path, tmp_path: Path) -> None:
    words = [str(run), f"output={tmp_path / 'out'}", "tasks=knn,augmented,geometry", "maps=pca"]
    assert cli.evaluate([*words, "protocol.augmented.epochs=2", "protocol.augmented.rates=[1.0]"]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    measured = {(row["task"], row["features"]) for row in record["measurements"]}
    kinds = ("learned", "raw pixels")
    assert {(task, kind) for task in ("knn", "augmented", "geometry") for kind in kinds} <= measured
    # The weights that the run started from are not in its folder.
    assert {row["features"] for row in record["failures"]} == {"random weights"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000


def test_a_classifier_is_measured_by_the_view_that_it_is_exported_with(
    run: Path, opened: PretrainedBackbone, tmp_path: Path
) -> None:
    words = [str(run), f"output={tmp_path / 'out'}", "min_steps=4", "epochs=1", "batch_size=8", "views.crop_pct=0.9"]
    assert cli.finetune([*words, "held_out=0", "workers=1"]) == 0
    assert opened.recipe is not None
    test = opened.recipe.data.build().test
    assert isinstance(test, Files)
    model = timm.create_model(f"local-dir:{tmp_path / 'out' / 'classifier'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert (config["crop_pct"], tuple(config["mean"])) == (0.9, MEAN)
    transform = timm.data.create_transform(**config)
    with torch.inference_mode():
        predictions = model(torch.stack([transform(Image.open(test.root / name)) for name in test.names])).argmax(1)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["confusion"] == confusion_matrix(test.labels, predictions, labels=range(2)).tolist()


def test_of_an_older_run_the_whole_shorter_side_is_seen(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "backbone", tmp_path / "backbone")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("crop_pct", "mean", "std"):
        del settings["views"][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert open_run(tmp_path).view == StandardView(32, 3, 0.5, 0.25, crop_pct=1.0)
