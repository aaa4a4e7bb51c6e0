"""Features once: as files that several processes write, that go on after a cut, and that know when they are stale."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from manyviews import cli
from manyviews.config import load
from manyviews.data import Sample, select
from manyviews.data.images import Pictures
from manyviews.data.pictures import pictures
from manyviews.features import store, store_rows
from manyviews.features.backbone import open_run
from manyviews.features.cached import features_of
from manyviews.features.encoding import EncodeSettings, encoded, images_of
from manyviews.features.extract import ExtractSettings, extract
from manyviews.system.console import Console
from manyviews.views import StandardView
from processes import launched
from small_run import small_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "extract.py"
SAMPLE = Sample().build()
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    small_run(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-three images of two classes."""
    place = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for index in range(43):
        (place / ("ab"[index % 2])).mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (30, 34), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "ab"[index % 2] / f"{index}.png")
    return place


def words(folder: Path, output: Path, *more: str) -> list[str]:
    return [f"data={folder}", "data.size=28", "data.channels=1", f"output={output}", "batch_size=8", *more]


def settings(*given: str) -> ExtractSettings:
    return load(ExtractSettings, None, list(given))


def manifest(output: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((output / "manifest.json").read_text())
    return content


def test_every_layer_and_every_image_is_written_once(run: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    extract(run, settings(*words(folder, output, "layers=backbone,projector,stages.0", "parquet=true", "faiss=true")))
    told, opened = manifest(output), open_run(run)
    images = load(ExtractSettings, None, words(folder, output)).data.build()
    assert [entry[:2] for entry in told["images"]] == [
        *(["train", index] for index in range(len(images.train))),
        *(["test", index] for index in range(len(images.test))),
    ]
    assert [entry[2] for entry in told["images"]] == [*images.train.names, *images.test.names]
    assert np.load(output / "labels.npy").tolist() == images.train.labels.tolist() + images.test.labels.tolist()
    parts = (images.train, images.test)
    seen = torch.cat([opened.view(pictures(part, torch.arange(len(part)), opened.view)) for part in parts])
    backbone, projector = opened.backbone().eval(), opened.head("projector").module.eval()
    with torch.inference_mode():
        expected = {"backbone": backbone(seen), "projector": projector(backbone.forward_summary(seen))}
        expected["stages.0"] = backbone.stages[0](backbone.stem(seen)).mean((2, 3))
    for name, rows in expected.items():
        found = np.load(output / f"{name}.npy", mmap_mode="r")
        torch.testing.assert_close(torch.from_numpy(found.copy()), rows, atol=1e-5, rtol=1e-4)
        assert told["layers"][name] == {"file": f"{name}.npy", "shape": list(rows.shape), "dtype": "float32"}
        assert (output / f"{name}.fvecs").stat().st_size == 43 * 4 * (rows.shape[1] + 1)
    assert told["weights"]["sha256"] == opened.origin["sha256"]
    assert told["weights"]["projector"]["file"] == "checkpoints/step-000000007/encoder.safetensors"
    assert set(told["files"]) | {"manifest.json"} == {file.name for file in output.iterdir()}


def test_plain_timm_gives_the_same_features_in_three_lines(run: Path, tmp_path: Path) -> None:
    extract(run, settings(f"output={tmp_path / 'out'}", "split=test"))
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    pictures = [Image.fromarray(SAMPLE.test.read(torch.tensor([index]))[0, 0].numpy()) for index in range(20)]
    with torch.inference_mode():
        features = backbone(torch.stack([transform(picture) for picture in pictures]))
    store = np.load(tmp_path / "out" / "backbone.npy")[:20]
    torch.testing.assert_close(torch.from_numpy(store), features, atol=1e-5, rtol=1e-4)


def test_what_is_complete_is_left_alone_and_exports_are_added(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(folder, tmp_path / "out")
    extract(run, settings(*given))
    before = (tmp_path / "out" / "backbone.npy").stat().st_mtime_ns
    for more in ((), ("faiss=true",), ("faiss=true",), ("overwrite=true",)):
        extract(run, settings(*given, *more))
    assert capsys.readouterr().out.count("is up to date") == 3
    assert (tmp_path / "out" / "backbone.npy").stat().st_mtime_ns == before
    assert manifest(tmp_path / "out")["files"] == ["backbone.npy", "labels.npy", "backbone.fvecs"]


def test_stale_features_are_refused_with_what_differs_and_replaced_when_asked(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    output = tmp_path / "out"
    extract(own, settings(*words(folder, output)))
    before = np.load(output / "backbone.npy")
    with pytest.raises(ValueError, match=r"layers\.stem was absent and is there; overwrite=true replaces them"):
        extract(own, settings(*words(folder, output, "layers=backbone,stem")))
    with pytest.raises(ValueError, match='precision was "fp32" and is "bf16"'):
        extract(own, settings(*words(folder, output, "precision=bf16")))
    with pytest.raises(ValueError, match=r"fingerprints\.test was there and is absent"):
        extract(own, settings(*words(folder, output, "split=train")))
    shutil.rmtree(own)
    small_run(own, "encoder.projector.dim=64")
    (own / "backbone" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.sha256 was"):
        extract(own, settings(*words(folder, output)))
    extract(own, settings(*words(folder, output, "overwrite=true", "layers=stem")))
    assert not (output / "backbone.npy").exists()
    assert np.load(output / "stem.npy").shape == (len(before), 32)


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C once this many batches are encoded; returns how many images are encoded in all."""
    counted: list[int] = []

    def counting(*given: object, **named: object) -> object:
        for ids, rows in encoded(*given, **named):
            counted.append(len(ids))
            yield ids, rows
            if len(counted) == batches:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(store_rows.encoding, "encoded", counting)
    return counted


def test_what_was_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(run, settings(*words(folder, tmp_path / "whole")))
    counted = interrupted_after(3, monkeypatch)
    assert cli.extract([str(run), *words(folder, tmp_path / "cut")]) == 130
    assert "stopped by SIGINT: what had been saved stays; re-run the same command" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert cli.extract([str(run), *words(folder, tmp_path / "cut")]) == 0
    assert "24 of 43 images are there already" in capsys.readouterr().out
    assert sum(counted) == 43
    for name in ("backbone.npy", "labels.npy", "manifest.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / ".partial").exists()


def extract_and_tell(told: Path, *given: str) -> int:
    with Path(f"{told}-{os.environ['RANK']}").open("w") as file, redirect_stdout(file):
        return cli.extract(given)


def test_two_processes_write_the_same_bytes_as_one_also_after_a_kill(run: Path, folder: Path, tmp_path: Path) -> None:
    extract(run, settings(*words(folder, tmp_path / "one", "layers=backbone,projector", "threads=1")))
    given = words(folder, tmp_path / "two", "layers=backbone,projector", "threads=1")
    # A third of the rows, as a killed process leaves them.
    shutil.copytree(tmp_path / "one", tmp_path / "two" / ".partial")
    key = manifest(tmp_path / "one")
    names = ("weights", "input", "precision", "fingerprints", "layers")
    (tmp_path / "two" / ".partial" / "key.json").write_text(json.dumps({name: key[name] for name in names}))
    (tmp_path / "two" / ".partial" / "done-00003.txt").write_text("8 16 done\n16 2")
    for name in ("backbone.npy", "projector.npy"):
        np.load(tmp_path / "two" / ".partial" / name, mmap_mode="r+")[16:] = 7
        np.load(tmp_path / "two" / ".partial" / name, mmap_mode="r+")[:8] = 7
    launched(extract_and_tell, tmp_path / "told", str(run), *given)
    assert (tmp_path / "told-0").read_text().count("8 of 43 images are there already") == 1
    assert not (tmp_path / "told-1").read_text()
    for name in ("backbone.npy", "projector.npy", "labels.npy", "manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_process_that_is_killed_leaves_rows_that_count(run: Path, tmp_path: Path) -> None:
    given = [str(run), f"output={tmp_path / 'out'}", "batch_size=1", "threads=1"]
    begun = tmp_path / "out" / ".partial" / "done-00000.txt"
    with subprocess.Popen([sys.executable, str(SCRIPT), *given], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not begun.exists() or not begun.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Another batch size is only another way to cut what is left.
    extract(run, settings(*given[1:2], "batch_size=512"))
    features = np.load(tmp_path / "out" / "backbone.npy")
    backbone = open_run(run).backbone().eval()
    chosen = torch.tensor([0, 1, 2, 500, 9_999])
    with torch.inference_mode():
        expected = backbone(StandardView(28, 1)(Pictures((SAMPLE.train.read(chosen),))))
    torch.testing.assert_close(torch.from_numpy(features[chosen]), expected, atol=1e-5, rtol=1e-4)
    assert len(features) == len(SAMPLE.train) + len(SAMPLE.test)


def test_a_backbone_that_sees_more_pixels_than_are_stored_is_told_of(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in words(folder, tmp_path / "a") if not word.startswith("data.size")]
    assert cli.extract([str(run), *given, "data.size=16"]) == 0
    assert "images are enlarged from 14 to 28 pixels" in (said := capsys.readouterr().out)
    assert "data.size=32 keeps" in said
    assert cli.extract([str(run), *given, "overwrite=true", "data.size=32"]) == 0
    assert "enlarged" not in capsys.readouterr().out


def test_timm_models_are_a_baseline(folder: Path, tmp_path: Path) -> None:
    for name, pretrained in (("resnet18", "false"),):
        given = words(folder, tmp_path / name, f"pretrained={pretrained}", "size=32", "layers=backbone,layer2")
        assert cli.extract([name, *given]) == 0
    told = manifest(tmp_path / "resnet18")
    assert told["model"] == "resnet18"
    assert told["weights"]["pretrained"] is False
    assert told["input"]["interpolation"] == "bicubic"
    assert np.load(tmp_path / "resnet18" / "layer2.npy").shape == (43, 128)


def test_cached_features_come_back_while_they_are_true(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, opened = select(SAMPLE.train, torch.arange(50)), open_run(run)
    asked, cache = EncodeSettings(batch_size=16), tmp_path / "features"
    computed = features_of(opened, images, asked, QUIET)
    assert not cache.exists()
    for layer, untrained in (("backbone", False), ("backbone", False), ("backbone", True), ("stem", False)):
        rows = features_of(opened, images, asked, Console(), layer=layer, untrained=untrained, cache=cache)
        if layer == "backbone" and not untrained:
            assert torch.equal(rows, computed)
        else:
            assert rows.shape == (50, 1152 if layer == "backbone" else 32)
            assert not torch.equal(rows[:, :32], computed[:, :32])
    assert capsys.readouterr().out.count("encoding 50 images") == 3
    other = select(SAMPLE.train, torch.arange(1, 51))
    features_of(opened, other, asked, QUIET, cache=cache)
    assert len(list(cache.iterdir())) == 4
    # With other weights the old features go, and the new ones take their place.
    object.__setattr__(changed := open_run(run), "origin", {"file": "x", "sha256": "0"})
    features_of(changed, images, asked, Console(), cache=cache)
    features_of(changed, images, asked, Console(), cache=cache)
    assert capsys.readouterr().out.count("encoding 50 images") == 1
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_cannot_be_kept_is_done_without(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "features").write_text("a file")
    images = select(SAMPLE.train, torch.arange(5))
    rows = features_of(open_run(run), images, EncodeSettings(), Console(), cache=tmp_path / "features")
    assert rows.shape == (5, 1152)
    assert "features are not kept" in capsys.readouterr().out


def test_wrong_words_are_answered_before_anything_is_written(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    own = words(folder, tmp_path / "out")
    refused = {
        (str(run), *own, "layers=backbone,stage.0"): "has no 'stage.0'; did you mean stages.0",
        (str(run), f"output={tmp_path / 'out'}", f"data={folder}"): "use data.channels=1",
        (str(run), *words(folder, tmp_path / "file")): "is a file; name a folder",
        (str(run), *words(folder, tmp_path / "file" / "out")): "is a file; name a folder",
        (str(run), *words(folder, tmp_path / "full")): "holds other files",
        (str(run), *own, "size=1"): "size=1: the backbone of",
        (str(run), *own, "pretrained=true"): "is a run with weights of its own: leave it out",
        ("resnet18", *own): "pretrained=true for its published weights",
        ("resnet18", *own, "pretrained=false", "layers=projector"): "a timm model, which has no projector",
        (
            "resnet18",
            "pretrained=false",
            f"output={tmp_path / 'out'}",
        ): "has no images of its own; say which",
        (str(run.parent), *own): f"there are {run}",
        tuple(own): "a run folder or a timm model comes first",
        (str(run), f"data={folder / 'a'}", *own[1:], "split=test"): "have no held-out part",
    }
    for given, answer in refused.items():
        assert cli.extract(list(given)) == 2, given
        assert answer in capsys.readouterr().err, given
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_said(run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="may not be written to"):
        extract(run, settings(*words(folder, tmp_path / "locked" / "out")))


def test_an_image_that_breaks_after_the_listing_is_named_in_the_manifest(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(folder, tmp_path / "images")
    content = (place / "a" / "0.png").read_bytes()
    (place / "a" / "0.png").write_bytes(content[: len(content) // 2])
    given = words(place, tmp_path / "out", "data.memory=0", "data.max_bad=0.1")
    extract(run, settings(*given))
    told = manifest(tmp_path / "out")
    assert [entry[0] for entry in told["unreadable"]] == ["a/0.png"]
    assert len(told["images"]) == 43


def test_an_exported_model_gives_the_same_features_without_torchs_eager_mode(run: Path) -> None:
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).eval()
    images = StandardView(28, 1)(Pictures((SAMPLE.test.read(torch.arange(7)),)))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(backbone, (images[:2],), dynamic_shapes=({0: batch},))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(images), backbone(images), atol=1e-5, rtol=1e-5)


def test_onnx_gives_the_same_features(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True).eval()
    images = StandardView(28, 1)(Pictures((SAMPLE.test.read(torch.arange(7)),)))
    dynamic = {0: torch.export.Dim("batch", min=1, max=1024)}
    torch.onnx.export(
        backbone, (images[:2],), tmp_path / "b.onnx", input_names=["images"], dynamo=True, dynamic_shapes=(dynamic,)
    )
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(features), backbone(images), atol=1e-5, rtol=1e-5)


def test_a_cut_before_the_manifest_leaves_nothing_to_encode_and_is_finished(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(folder, tmp_path / "out")
    extract(run, settings(*given))
    whole = (tmp_path / "out" / "manifest.json").read_bytes(), (tmp_path / "out" / "backbone.npy").read_bytes()
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomic", refuse(store.write_atomic, "manifest.json"))
        with pytest.raises(OSError, match="No space left"):
            extract(run, settings(*given))
    assert (tmp_path / "out" / "backbone.npy").exists()
    extract(run, settings(*given))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == whole[0]
    assert (tmp_path / "out" / "backbone.npy").read_bytes() == whole[1]


def refuse(write: Callable[..., None], name: str) -> Callable[..., None]:
    def full(file: Path, content: Iterable[bytes], root: Path | None = None) -> None:
        if file.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content, root)

    return full


def test_features_of_images_that_cannot_be_read_now_are_not_kept(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, cache = shutil.copytree(folder, tmp_path / "images"), tmp_path / "features"
    given = settings(*words(own, tmp_path / "x", "data.memory=0", "data.max_bad=0.5"))
    split = images_of(open_run(run), given, QUIET)
    lost = own / split.train.names[0]
    content = lost.read_bytes()
    lost.write_bytes(b"")
    for _ in range(2):
        grey = features_of(open_run(run), split.train, EncodeSettings(batch_size=16), Console(), cache=cache)
        assert "are not kept" in " ".join(capsys.readouterr().out.split())
        assert not list(cache.rglob("*.npy"))
    lost.write_bytes(content)
    split = images_of(open_run(run), given, QUIET)
    again = features_of(open_run(run), split.train, EncodeSettings(batch_size=16), QUIET, cache=cache)
    assert not torch.equal(grey[0], again[0])
    assert torch.equal(grey[1:], again[1:])
    assert len(list(cache.rglob("*.npy"))) == 1
