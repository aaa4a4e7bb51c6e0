"""The kinds of files that a stranger may hand over: samples that are sound, and what reads a damaged one."""

import gzip
import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from benchmarks.fuzzing import tables
from benchmarks.fuzzing.tables import written
from manyviews import recipe
from manyviews.config import dump_yaml, load
from manyviews.data.decoding.decode import Decoding
from manyviews.data.sources.fashion_mnist import read_split
from manyviews.encoder.timm_format import read_folder
from manyviews.features import store
from manyviews.linear_metrics import LinearMetric
from manyviews.recipe import Recipe
from manyviews.report.history import read_history, warnings_of
from manyviews.run.checkpoints import Checkpoint, Saver, newest_checkpoint
from manyviews.system.arrays import mapped_array, read_tensors
from manyviews.system.files import read_json

PIXELS = 1_000_000
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
KEY: dict[str, Any] = {
    "weights": {"sha256": "0" * 64},
    "layers": {"backbone": {"file": "backbone.npy", "shape": [6, 3]}},
}


class Kind(NamedTuple):
    """One kind of file."""

    name: str
    share: int
    """How many inputs of this kind there are beside those of others."""
    text: bool
    samples: Sequence[bytes]
    read: Callable[[Path, bytes], object]
    """Writes a file into a folder of its own and reads it; raises ValueError or OSError where it is refused."""
    patience: int = 1
    """How many times longer than others it may take."""


class RefusedError(ValueError):
    """What a reader says in words without raising."""


def kinds(place: Path) -> list[Kind]:
    """All kinds; sound files that are needed beside the damaged ones are made in a folder."""
    found = [Kind(f"image, {form}", 2, text=False, samples=_pictures(form), read=_image) for form in FORMATS]
    found += [
        Kind("safetensors", 3, text=False, samples=_tensors(), read=_read_tensors),
        Kind("metric (safetensors)", 1, text=False, samples=_metrics_of_distance(place), read=_read_metric),
        Kind("array (npy)", 2, text=False, samples=_arrays(), read=_read_array),
        Kind("Fashion-MNIST (idx, gzip)", 1, text=False, samples=_idx(), read=_read_idx),
        Kind("recipe (YAML)", 3, text=True, samples=_recipes(), read=_read_recipe),
        Kind("labels (CSV)", 1, text=True, samples=tables.labels(), read=tables.check_labels),
        Kind("values (CSV)", 1, text=True, samples=tables.values(), read=tables.check_values),
        Kind("relations (CSV, JSON lines)", 2, text=True, samples=tables.relations(), read=tables.check_relations),
        Kind("metrics.jsonl", 2, text=True, samples=_metrics(), read=_read_metrics),
        Kind("evaluation.json", 1, text=True, samples=_evaluations(), read=_read_json),
        Kind("config.json of a backbone", 2, text=True, samples=_descriptions(), read=_read_description),
        Kind("manifest of features", 2, text=True, samples=_manifests(), read=_read_manifest),
    ]
    return found + _checkpoints(place)


def _pictures(form: str) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (18, 24, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    found = []
    for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "CMYK", "LA", "F"):
        picture = Image.fromarray(noise, "RGBA").convert("L" if mode in ("I;16", "F") else mode)
        picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
        others = [picture.rotate(90 * turn) for turn in (1, 2)]
        for options in ({}, {"exif": exif, "icc_profile": bytes(200)}, {"save_all": True, "append_images": others}):
            content = io.BytesIO()
            try:
                picture.save(content, form, **options)
            except (OSError, ValueError, KeyError, TypeError):  # a format has not every mode
                continue
            found.append(content.getvalue())
    if form == "TIFF":
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
            content = io.BytesIO()
            Image.fromarray(noise[..., :3], "RGB").save(content, form, compression=compression)
            found.append(content.getvalue())
    return list(dict.fromkeys(found))


def _image(place: Path, content: bytes) -> None:
    pixels = Decoding(3, 8, (255, 255, 255), PIXELS).read(written(place / "x.jpg", content))
    assert pixels.shape == (3, 8, 8)


def _tensors() -> list[bytes]:
    states = (
        {"weight": torch.randn(4, 3), "bias": torch.zeros(4), "steps": torch.tensor(3)},
        {"half": torch.zeros(2, 2, dtype=torch.bfloat16), "none": torch.zeros(0, 4), "flag": torch.tensor([True])},
    )
    return [save(states[0]), save(states[1], {"format": "pt"})]


def _read_tensors(place: Path, content: bytes) -> None:
    for value in read_tensors(written(place / "x.safetensors", content)).values():
        value.float().sum()


def _metrics_of_distance(place: Path) -> list[bytes]:
    file = place / "metric.safetensors"
    LinearMetric(torch.randn(2, 3), torch.zeros(3), {"name": "lmnn"}, {"loss": 0.5}).save(file)
    return [file.read_bytes()]


def _read_metric(place: Path, content: bytes) -> None:
    LinearMetric.load(written(place / "x.safetensors", content)).transform(torch.zeros(2, 3))


def _arrays() -> list[bytes]:
    found = []
    for array in (
        np.zeros((4, 3), np.float32),
        np.arange(5),
        np.zeros((0, 3)),
        np.array([{}], object),
        np.array(["a"]),
    ):
        content = io.BytesIO()
        np.save(content, array, allow_pickle=True)
        found.append(content.getvalue())
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return [*found, content.getvalue()]


def _read_array(place: Path, content: bytes) -> None:
    mapped_array(written(place / "x.npy", content)).sum()


def _idx() -> list[bytes]:
    plain = b"\0\0\x08\3" + struct.pack(">III", 2, 28, 28) + bytes(2 * 28 * 28)
    return [plain, gzip.compress(plain)]


def _read_idx(place: Path, content: bytes) -> None:
    compressed = content[:2] == b"\x1f\x8b"
    file = place / f"train-images-idx3-ubyte{'.gz' if compressed else ''}"
    written(place / "train-labels-idx1-ubyte", b"\0\0\x08\1" + struct.pack(">I", 2) + bytes(2))
    try:
        read_split(written(file, content).parent, "train")
    finally:
        file.unlink()


def _recipes() -> list[bytes]:
    files = sorted(recipe.folder().glob("*.yaml"))
    return [file.read_bytes() for file in files] + [dump_yaml(load(Recipe, file)).encode() for file in files[:3]]


def _read_recipe(place: Path, content: bytes) -> None:
    load(Recipe, written(place / "x.yaml", content))


def _metrics() -> list[bytes]:
    lines = [
        {"step": step, "loss": 5 / step, "epoch": step / 4, "seconds": step / 2, "embedding_std": 0.9, "knn": 0.5}
        | {"information": 1 - 1 / step, "ceiling": 5.0, "effective_rank": 30.0, "images_per_second": 500.0}
        for step in range(1, 9)
    ]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def _read_metrics(place: Path, content: bytes) -> None:
    written(place / "metrics.jsonl", content)
    written(place / "unreadable.txt", content)
    written(place / "done", content)
    written(place / "config.yaml", dump_yaml(load(Recipe, recipe.find("quickstart"))).encode())
    history = read_history(place)
    warnings_of(history, 128)


def _evaluations() -> list[bytes]:
    rows = [{"task": "knn", "features": "learned", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}]
    return [json.dumps({"weights": {"sha256": "0" * 64}, "images": ["0" * 64], "measurements": rows}).encode()]


def _read_json(place: Path, content: bytes) -> None:
    read_json(written(place / "x.json", content))


def _descriptions() -> list[bytes]:
    described = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    described |= {"num_classes": 0, "first_conv": "stem.0", "classifier": "head", "fixed_input_size": False}
    whole = {
        "architecture": "light_resnet",
        "num_classes": 0,
        "pretrained_cfg": described,
        "model_args": {"in_chans": 3},
    }
    older = {"architecture": "resnet18", **described, "url": "https://example.org/x.pth", "custom_load": True}
    return [json.dumps(whole, indent=1).encode(), json.dumps(older).encode()]


def _read_description(place: Path, content: bytes) -> None:
    written(place / "config.json", content)
    read_folder(place).options(pretrained=True)


def _manifests() -> list[bytes]:
    head = json.dumps({**KEY, "unreadable": [], "files": ["backbone.npy"]}, indent=1).removesuffix("\n}")
    return [f'{head},\n{store.IMAGES}\n  ["train", 0, "a.png"]\n ]\n}}\n'.encode()]


def _read_manifest(place: Path, content: bytes) -> None:
    written(place / store.MANIFEST, content)
    np.save(place / "backbone.npy", np.zeros((6, 3), np.float32))
    try:
        store.state(place, KEY)
    finally:
        store.remove(place)
        if (place / store.MANIFEST).exists():
            raise AssertionError("a manifest outlived its removal")


def _checkpoints(place: Path) -> list[Kind]:
    """A kind for each file of a checkpoint."""
    whole = place / "checkpoints"
    module = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    parts = {"encoder": module.state_dict(), "objective": {"rows": torch.zeros(4, 3)}}
    metadata = {"seconds": 1.0, "images": "0" * 64, "channels": 3}
    saver = Saver(whole, keep=1)
    saver.begin(Checkpoint(7, parts, optimiser.state_dict(), metadata, {"objective.rows": 4}))
    saver.finish()
    (made,) = whole.iterdir()

    def reader(name: str) -> Callable[[Path, bytes], None]:
        def read(folder: Path, content: bytes) -> None:
            shutil.copytree(whole, folder / "checkpoints")
            damaged = written(folder / "checkpoints" / made.name / name, content)
            _seal(damaged.with_name("manifest.json"), damaged)
            found, skipped = newest_checkpoint(folder / "checkpoints")
            if found is None:
                assert skipped, "a checkpoint was passed over without a word"
                raise RefusedError(skipped[0])

        return read

    found = []
    for file in sorted(made.iterdir()):
        text = file.suffix == ".json"
        name = f"checkpoint: {file.name}"
        found.append(Kind(name, 2, text=text, samples=[file.read_bytes()], read=reader(file.name)))
    return found


def _seal(manifest: Path, damaged: Path) -> None:
    """Makes the hashes right again, as a stranger would: what they guard is to be looked at too."""
    try:
        said = json.loads(manifest.read_bytes())
        if damaged != manifest:
            content = damaged.read_bytes()
            said["files"][damaged.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        said.pop("seal")
        said["seal"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps(said))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # what is no manifest at all has no seal
