"""Features of images, computed once by a backbone that has learned something, and kept as files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from manyviews.config import Settings, as_list, vocabulary
from manyviews.data import Data, Images, Split, background_of, shorthand
from manyviews.features import encoding, exports, store
from manyviews.features.backbone import PretrainedBackbone, digest_of, open_model
from manyviews.features.layers import BACKBONE, EMBEDDING, PROJECTOR, Layers, OneLayer, widths_of
from manyviews.features.store_rows import Part, entries, fill, labels_of
from manyviews.system import distributed
from manyviews.system.arrays import mapped_array
from manyviews.system.console import Console
from manyviews.system.disk import check_writable
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.launch import start
from manyviews.system.plural import plural
from manyviews.system.writing import make_folder, replacing
from manyviews.views import enlarged

LABELS = "labels.npy"


class EncodeSettings(Settings):
    """What all have in common that encode images by a backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}
    synonyms: ClassVar[Mapping[str, tuple[str, ...]]] = vocabulary.KEYS
    hints: ClassVar[Mapping[str, str]] = vocabulary.HINTS

    data: Data | None = None
    """The images; null: the run's own, or for a timm model the bundled sample."""
    batch_size: int = Field(256, ge=1, le=1_048_576)
    """Images encoded at once by each process; the features depend on it by rounding alone."""
    precision: encoding.Precision = "fp32"
    """Arithmetic of the backbone: bf16 and fp16 are faster where the device is built for them; the files are fp32."""
    workers: int = Field(2, ge=0, le=1024)
    """Threads that decode images, for each process."""


class ExtractSettings(EncodeSettings):
    """What features are extracted from, and where they go."""

    output: str
    """The folder that is written. Where the same features were begun they go on, and where they are complete nothing is
    done."""
    overwrite: bool = False
    """Replace what other features the output folder holds."""
    split: Literal["all", "train", "test"] = "all"
    """Which of the images; all: the training images, then the held-out ones."""
    layers: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field((BACKBONE,), min_length=1)
    """What is kept, one or several with commas: backbone; of a run projector and embedding, which its objective
    compares (the predictor's output where there is a predictor, else the projector's); or a module of the backbone by
    its name, whose maps are averaged: layer3, blocks.5."""
    pretrained: bool | None = None
    """For a timm name: true for its published weights (downloaded), false for random ones."""
    size: int | None = Field(None, ge=1, le=4096)
    """Side of the square that the backbone sees, in pixels; null: what it was trained on."""
    parquet: bool = False
    """Write features.parquet too: split, id, name, label and a column for each layer (needs pyarrow)."""
    faiss: bool = False
    """Write LAYER.fvecs too: vectors of unit length, as faiss reads them."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process on the CPU; null: the cores divided among the processes."""


def extract(given: str | Path, settings: ExtractSettings) -> Path:
    """Writes features of images by a run's or a timm model's backbone, over all processes; returns the folder.

    LAYER.npy is float32 [images, width] for each layer, labels.npy int64 [images] with -1 where an image has none
    (absent where none has one), and manifest.json tells where they come from, and of each row its split, id and name.
    What was interrupted goes on where it was, what is complete and still true is left as it is.

    Raises:
        ValueError: if the model, the images or a layer cannot be had, the output holds other things, or the disk is
            full; before anything is written.
    """
    accelerator = start(None, "fp32", settings.threads, trains=False)
    console = Console(quiet=not accelerator.is_main_process)
    output = Path(settings.output).expanduser()
    check_place(output)
    if settings.parquet:
        exports.check_parquet()
    opened = open_model(str(given), pretrained=settings.pretrained, size=settings.size)
    layers, origin = layers_of(opened, settings.layers)
    widths = widths_of(layers, opened.blank())
    split = images_of(opened, settings, console)
    parts = _parts(split, settings.split)
    key = _key(opened, origin, settings, parts, widths)
    wanted = [exports.TABLE] * settings.parquet + [f"{name}.fvecs" for name in settings.layers] * settings.faiss
    with store.held(output, key, replace=settings.overwrite, copies=1 + settings.parquet + settings.faiss) as complete:
        if complete and all((output / name).is_file() for name in wanted):
            console.say(f"{output} is up to date")
            return output
        if not complete:
            _fill(output, key, opened, layers, parts, settings, console)
        with raise_on_all_ranks():
            if distributed.rank() == 0:
                data = settings.data or (opened.recipe.data if opened.recipe is not None else None)
                _publish(output, key, opened, data, split, parts, wanted)
    for layer in key["layers"].values():
        rows, width = layer["shape"]
        console.say(f"{rows:,} × {width:,} features: {output / layer['file']}")
    return output


def features_of(
    opened: PretrainedBackbone,
    images: Images,
    settings: EncodeSettings,
    console: Console,
    *,
    layer: str = BACKBONE,
    untrained: bool = False,
    cache: Path | None = None,
    also: Path | None = None,
) -> Tensor:
    """The features of all images by one layer: float32 [images, width] on the CPU, the same on every process.

    They come from a sub-folder of the cache if they are there and still true: the weights, the input, the images'
    fingerprint and the precision are compared. Otherwise they are computed over all processes and kept there, in place
    of those that are true no longer; what comes from there is mapped into memory, not read. A cache that cannot be
    written to, or that another process is writing to, is done without.

    Args:
        opened: a run or a timm model.
        images: what is encoded.
        settings: how it is encoded; its data are not looked at.
        console: told how far it has come.
        layer: as in `Layers`.
        untrained: the backbone as it was before its first step, a baseline.
        cache: the folder of all cached features, RUN/features for example; None: none are kept.
        also: another such folder, which is read alone.

    Raises:
        ValueError: for an unknown layer, or features that are not finite.
    """
    layers, origin = layers_of(opened, (layer,), untrained=untrained)
    said = f"encoding {plural(len(images), 'image')}: {'random weights' if untrained else opened.name}"
    if cache is not None or also is not None:
        parts = [Part("images", images, 0)]
        key = _key(opened, origin, settings, parts, widths_of(layers, opened.blank()))
        name = f"{layer}{'-untrained' * untrained}-{images.fingerprint[:16]}"
        for there in dict.fromkeys(filter(None, (cache, also))):
            if (rows := _complete(there / name, key, layer)) is not None:
                return rows
    if cache is not None:
        try:
            return _kept(cache.parent, cache / name, key, opened, layers, parts, settings, console, said)
        except (OSError, ValueError) as problem:
            console.warn(f"features are not kept: {problem}")
    console.say(said)
    return _in_memory(opened, OneLayer(layers), images, settings)


def _complete(folder: Path, key: Mapping[str, Any], layer: str) -> Tensor | None:
    """The rows of complete features of a key, without a lock, for a folder may be read that cannot be written."""
    rows: Tensor | None = None
    with suppress(OSError, ValueError):
        if store.state(folder, key) == "complete":
            rows = store.mapped(folder / f"{layer}.npy")
    return None if distributed.any_over_ranks(rows is None) else rows


def _kept(
    root: Path,
    folder: Path,
    key: Mapping[str, Any],
    opened: PretrainedBackbone,
    layers: Layers,
    parts: Sequence[Part],
    settings: EncodeSettings,
    console: Console,
    said: str,
) -> Tensor:
    """The rows of a folder, which are computed where they are not complete; raises where they cannot be written."""
    (layer,) = key["layers"]
    with store.held(folder, key, replace=True, root=root) as complete:
        if not complete:
            console.say(said)
            _fill(folder, key, opened, layers, parts, settings, console, root)
            if store.remarks(folder):
                return _not_kept(root, folder, layer, console)
            with raise_on_all_ranks():
                if distributed.rank() == 0:
                    store.finish(folder, [f"{layer}.npy"], key, (), root)
        return store.mapped(folder / f"{layer}.npy")


def _not_kept(root: Path, folder: Path, layer: str, console: Console) -> Tensor:
    """Features some of which are those of a grey square: used now, and computed anew when the files can be read."""
    count = len(store.remarks(folder))
    console.warn(f"{plural(count, 'image')} could not be read now, and stand as grey; so these features are not kept")
    encoding = store.mapped(folder / store.PARTIAL / f"{layer}.npy")
    distributed.barrier()
    if distributed.rank() == 0:
        store.remove(folder, root)
    return encoding


def images_of(opened: PretrainedBackbone, settings: EncodeSettings, console: Console) -> Split:
    """The images that were asked for, as the backbone can see them.

    Raises:
        ValueError: if they are not named, cannot be read, or have other channels than the backbone takes.
    """
    data = settings.data or (opened.recipe.data if opened.recipe is not None else None)
    if data is None:
        raise ValueError(f"{opened.name} has no images of its own; say which with data=…, a folder or a known name")
    with console.bar():
        split = data.build(workers=settings.workers, report=console.report)
    # Grey images are shown in grey to a backbone that has learned from colour.
    if split.train.channels > opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but {opened.name} has learned from {opened.channels}: "
            f"for a folder, data.channels={opened.channels} reads them so"
        )
    if split.layout:
        console.say(f"images     {split.layout}")
    larger = enlarged(opened.size, split.train.size, data)
    if larger is not None:
        console.warn(larger)
    return split


def check_place(output: Path) -> None:
    """Checks that features may be written to a folder, before anything is done.

    Raises:
        ValueError: if it is a file, holds other things than features, or may not be written to.
    """
    check_writable(output)
    if output.is_dir() and not store.ours(output) and any(output.iterdir()):
        raise ValueError(f"output={output} holds other files; name a folder that does not exist yet")


def layers_of(
    opened: PretrainedBackbone, names: tuple[str, ...], *, untrained: bool = False
) -> tuple[Layers, dict[str, Any]]:
    """What reads layers of an opened model, on its device, and where the weights come from, as JSON values.

    Raises:
        ValueError: for a name that is no layer, or a projector or an embedding that cannot be had.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backbone = opened.untrained() if untrained else opened.backbone()
    origin: dict[str, Any] = dict(opened.origin)
    if untrained:
        origin = {"untrained": True, "sha256": digest_of(backbone.state_dict())}
    made = {PROJECTOR: opened.projector, EMBEDDING: opened.embedding}
    heads = {} if untrained else {name: made[name]() for name in names if name in made}
    origin |= {name: head.origin for name, head in heads.items()}
    layers = Layers(backbone, names, {name: head.module for name, head in heads.items()}).to(device)
    return layers.to(memory_format=_memory_format(opened)), origin


def _memory_format(opened: PretrainedBackbone) -> torch.memory_format:
    channels_last = opened.recipe is None or opened.recipe.train.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def _parts(split: Split, chosen: str) -> list[Part]:
    """The parts of a split that were chosen, one after the other."""
    parts: list[Part] = []
    for name, images in (("train", split.train), ("test", split.test)):
        if images is not None and chosen in ("all", name):
            first = parts[-1].first + len(parts[-1].images) if parts else 0
            parts.append(Part(name, images, first))
    if not parts:
        raise ValueError(f"split={chosen}: these images have no held-out part; use split=all")
    return parts


def _key(
    opened: PretrainedBackbone,
    origin: Mapping[str, Any],
    settings: EncodeSettings,
    parts: Sequence[Part],
    widths: Mapping[str, int],
) -> dict[str, Any]:
    """Everything from which the features follow, rounding aside, as JSON values."""
    total = sum(len(part.images) for part in parts)
    return {
        "weights": dict(origin),
        "input": opened.transform,
        "precision": settings.precision,
        "fingerprints": {part.name: part.images.fingerprint for part in parts},
        "layers": {
            name: {"file": f"{name}.npy", "shape": [total, width], "dtype": "float32"} for name, width in widths.items()
        },
    }


def _fill(
    folder: Path,
    key: Mapping[str, Any],
    opened: PretrainedBackbone,
    layers: Layers,
    parts: Sequence[Part],
    settings: EncodeSettings,
    console: Console,
    root: Path | None = None,
) -> None:
    with console.bar():
        fill(
            folder,
            layers,
            parts,
            prepare=opened.prepare,
            precision=settings.precision,
            batch_size=settings.batch_size,
            workers=settings.workers,
            say=console.say,
            update=console.update,
            root=root,
        )


def _publish(
    output: Path,
    key: Mapping[str, Any],
    opened: PretrainedBackbone,
    data: Data | None,
    split: Split,
    parts: Sequence[Part],
    wanted: Sequence[str],
) -> None:
    """Writes what stands beside complete rows: labels, exports and, last, the manifest."""
    place = output / store.PARTIAL
    make_folder(place, output)
    unreadable = [list(entry) for entry in split.unreadable] + store.remarks(output)
    before = store.described(output)
    if before is not None:
        unreadable = before["unreadable"]
    files = [layer["file"] for layer in key["layers"].values()]
    labels = labels_of(parts)
    if labels is not None:
        with replacing(place / LABELS, output) as (_, file):
            np.save(file, labels)
        files.append(LABELS)
    there = {name: [place / layer["file"], output / layer["file"]] for name, layer in key["layers"].items()}
    rows = {name: mapped_array(next(filter(Path.exists, files))) for name, files in there.items()}
    if exports.TABLE in wanted:
        with replacing(place / exports.TABLE, output) as (path, _):
            exports.write_parquet(path, rows, entries(parts), labels)
    for name, values in rows.items():
        if f"{name}.fvecs" in wanted:
            with replacing(place / f"{name}.fvecs", output) as (path, _):
                exports.write_vectors(path, values)
    files += dict.fromkeys([*wanted, *((before or {}).get("files", ()))])
    manifest = {
        "model": opened.name if opened.folder is None else str(opened.folder.resolve()),
        **key,
        # Files are decoded to squares first, which "input" tells what is made of.
        "decoded": {"size": split.train.size, "interpolation": "bicubic", "background": background_of(data)},
        "classes": list(split.train.classes),
        "unreadable": unreadable,
        "versions": {name: version(name) for name in ("manyviews", "torch", "timm")},
        "columns": ["split", "id", "name"],
    }
    store.finish(output, list(dict.fromkeys(files)), manifest, entries(parts))


def _in_memory(opened: PretrainedBackbone, module: nn.Module, images: Images, settings: EncodeSettings) -> Tensor:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    module = module.to(device).to(memory_format=_memory_format(opened))
    return encoding.extract(
        module,
        images,
        prepare=opened.prepare,
        device=device,
        batch_size=settings.batch_size,
        precision=settings.precision,
        workers=settings.workers,
    )
