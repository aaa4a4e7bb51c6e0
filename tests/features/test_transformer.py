"""`manyviews.Features` as scikit-learn knows transformers."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import manyviews
from manyviews import Features
from manyviews.config import load
from manyviews.data import Sample
from manyviews.features.backbone import open_run
from manyviews.features.cached import features_of
from manyviews.features.encoding import EncodeSettings
from manyviews.system.console import Console
from small_run import small_run

TRAIN = Sample().build().train
PIXELS = TRAIN.read(torch.arange(60))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    small_run(folder)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    files = [folder / f"{index}.png" for index in range(len(PIXELS))]
    for file, pixels in zip(files, PIXELS, strict=True):
        Image.fromarray(pixels[0].numpy()).save(file)
    return files


def test_every_kind_of_images_gives_the_features_of_extract(run: Path, paths: list[Path]) -> None:
    expected = features_of(open_run(run), TRAIN, EncodeSettings(), Console(quiet=True))[:60].numpy()
    arrays = PIXELS[:, 0].numpy()
    kinds: dict[str, Sequence[object] | np.ndarray | torch.Tensor] = {
        "paths": paths,
        "words": [str(path) for path in paths],
        "array of words": np.array([str(path) for path in paths]),
        "array": arrays,
        "array with channels": arrays[..., None],
        "tensor": PIXELS,
        "tensor without channels": PIXELS[:, 0],
        "list of arrays": list(arrays),
        "list of tensors": list(PIXELS),
        "pictures": [Image.open(path) for path in paths],
        "pictures in colour": [Image.open(path).convert("RGB") for path in paths],
    }
    transformer = Features(run).fit()
    for name, images in kinds.items():
        found = transformer.transform(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4, err_msg=name)


def test_of_a_wide_array_the_centre_is_seen(run: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (2, 28, 40), dtype=np.uint8)
    transformer = Features(str(run)).fit()
    expected = transformer.transform(wide[:, :, 6:34])
    np.testing.assert_allclose(transformer.transform(wide), expected, atol=1e-5)
    np.testing.assert_allclose(transformer.transform(list(wide)), expected, atol=1e-5)


def test_it_is_a_step_of_a_pipeline_that_is_scored_by_cross_validation(run: Path) -> None:
    labels = TRAIN.labels[:60].numpy()
    pipeline = make_pipeline(Features(str(run)), StandardScaler(), LogisticRegression(C=0.01))
    scores = cross_val_score(pipeline, PIXELS[:, 0].numpy(), labels, cv=3)
    assert scores.mean() > 0.3
    names = pipeline[:-1].fit(PIXELS[:, 0].numpy()).get_feature_names_out()
    assert list(names[:2]) == ["features0", "features1"]
    assert len(names) == 1152


def test_it_is_cloned_and_pickled_with_its_weights(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    transformer = Features(str(own), layer="projector", batch_size=7).fit()
    expected = transformer.transform(PIXELS)
    assert expected.shape == (60, 128)
    copy = clone(transformer)
    assert copy.get_params() == transformer.get_params()
    with pytest.raises(NotFittedError):
        copy.transform(PIXELS)
    shutil.rmtree(own)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(transformer)).transform(PIXELS), expected)


def test_a_timm_model_is_a_transformer_too() -> None:
    transformer = Features("resnet18", pretrained=False, size=32, layer="layer1").set_output(transform="default")
    assert transformer.fit_transform(PIXELS[:3]).shape == (3, 64)


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_estimators_unfitted",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_checks_that_need_no_table_pass(check: str, run: Path) -> None:
    getattr(estimator_checks, check)("Features", Features(str(run)))


def test_what_is_no_image_is_refused_in_words(run: Path, paths: list[Path], tmp_path: Path) -> None:
    transformer = Features(str(run)).fit()
    refused = {
        "not float32 [60, 1, 28, 28]": PIXELS.float(),
        "have 1 or 3 channels, not 28": PIXELS.permute(0, 2, 3, 1),
        "the images have 3 channels, but the backbone was trained on 1": PIXELS.expand(-1, 3, -1, -1),
        "str is not a list of images; for one image give a list of one": str(paths[0]),
        "there is no image": [],
        "an image is uint8 [height, width] or with 1 or 3 channels, not float64 [4, 4]": [np.zeros((4, 4))],
        "int is not an image": [1],
        "no such file or directory": [*paths[:2], tmp_path / "absent.png"],
    }
    for words, images in refused.items():
        with pytest.raises(ValueError) as problem:  # noqa: PT011  (the words are compared below)
            transformer.transform(images)
        assert words in str(problem.value)
    for parameters, words in (
        ({"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
        ({"workers": 1.5}, "workers=1.5 is not"),
        ({"precision": "fp8"}, "is none of fp32, bf16, fp16"),
        ({"layer": "stage"}, "did you mean stages"),
    ):
        with pytest.raises(ValueError, match=words):
            Features(str(run), **parameters).fit()
    with pytest.raises(AttributeError, match="has no attribute 'Feature'"):
        _ = manyviews.Feature


def test_importing_the_package_does_not_import_it() -> None:
    code = "import manyviews, sys; assert 'manyviews.features.transformer' not in sys.modules; manyviews.Features"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_of_a_folder_are_decoded_as_the_run_decoded_them(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    draw = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(files / f"{index}.png")
    small_run(tmp_path / "run", f"data={files}", "data.size=48", "data.memory=0", channels=3, size=32)
    opened = open_run(tmp_path / "run")
    assert opened.recipe is not None
    images = opened.recipe.data.build().train
    expected = features_of(opened, images, load(EncodeSettings, None, []), Console(quiet=True))
    found = Features(tmp_path / "run").fit_transform([files / name for name in images.names])
    np.testing.assert_array_equal(found, expected.numpy())
