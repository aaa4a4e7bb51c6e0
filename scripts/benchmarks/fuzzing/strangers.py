"""Beside damaged files: run folders with links, recipes with numbers without bounds, and text of any encoding."""

import io
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fuzzing.kinds import Kind
from manyviews.config import keys, load
from manyviews.data import Folder
from manyviews.evaluation import EvaluateSettings, evaluate
from manyviews.features import backbone
from manyviews.features.extract import ExtractSettings, extract
from manyviews.recipe import Recipe
from manyviews.run import folder as run
from manyviews.system import hardware
from manyviews.system.console import Console
from manyviews.system.launch import start
from manyviews.train.pretrain import pretrain, train_step
from manyviews.train.setup import make_setup

SMALL = [
    *("data.holdout=0.3", "data.size=8", "views.size=16", "encoder.projector.hidden=8", "encoder.projector.dim=8"),
    *("train.batch_size=8", "train.workers=0", "train.threads=1", "train.precision=fp32"),
]
SHORT = ["train.epochs=2", "train.save_minutes=0.00001", "train.log_every=1", "train.keep=9", "train.preview=2"]
MEASURED = ["tasks=[knn]", "metric=mahalanobis", "baselines=false", "maps=[]", "workers=0", "report=false"]
WRITTEN = (
    *("backbone", "checkpoints", "tensorboard", "tensorboard/evaluation", "features", "metrics", "metrics/mahalanobis"),
    *("checkpoints/step-000000001", "checkpoints/step-000000001.replaced", "checkpoints/.step-000000009.partial"),
    *("config.yaml", "metrics.jsonl", "images.jsonl", "unreadable.txt", "views.png", "not_finite.json", "done"),
    *("backbone/model.safetensors", "backbone/config.json", "evaluation.json", "outcomes.safetensors", "report.html"),
    *(".lock", ".evaluation.lock", ".metrics.jsonl.partial", ".metrics.jsonl.1-2.partial", ".done.1-2.partial"),
    *(".evaluation.json.1-2.partial", "evaluation.damaged.json", "checkpoints/.step-000000003.partial", "out"),
    *("checkpoints/step-000000002/manifest.json", "checkpoints/step-000000002/encoder.safetensors", "out/.partial"),
    *("out/manifest.json", "out/backbone.npy", "out/labels.npy", "out/.lock"),
)
"""What is written or removed in a run's folder and, of features that are extracted into it, in `out`."""
EXTREME = (
    *("1e9", "1e20", "1e308", "-1e308", "1e400", "nan", ".nan", "inf", "-.inf", "-1", "0", "1e-308", "1e-45", "2e9"),
    *("1000000", "4294967296", "18446744073709551616", "9" * 30, "9" * 400, "0.1", "1", "2", "3.5", "true", "''"),
)
ENCODINGS = ("latin-1", "cp1252", "utf-16", "utf-16-be", "utf-32", "utf-8-sig", "shift_jis", "koi8-r", "utf-7")
LETTERS = (
    *("é", "ß", "Ж", "日本", "\u202eabc", "\u200f", "\u2066", "\x00", "\x1b[2J", "\x07", "\x9b31m", "\ufeff", "\r"),
    *("\ud800", "\udcff", "\U0001f600", "e\u0301", "\u2028", "\x85", "\x7f", "\ufffe", "\U0010fce9"),
)
DRAWS = (b"", b"0123456789")
"""What draws follow from; with the first one nothing is drawn."""
WHOLE_RUN = 12
"""How many times longer than a file a run may take, on a machine that has other work."""
ROOM = 1 << 29
"""Bytes of memory that there are for recipes: what takes more must be refused and not tried."""


def strangers(place: Path, plain: Sequence[Kind]) -> list[Kind]:
    """The kinds; what is needed is made in a folder, and the texts are those of other kinds."""
    images = _images(place / "images")
    texts = [kind for kind in plain if kind.text and kind.name.startswith(("recipe", "labels", "values", "metrics.j"))]
    return [
        Kind(
            "run folder with links",
            1,
            text=True,
            samples=DRAWS,
            read=_linked(place / "linked", images),
            patience=WHOLE_RUN,
        ),
        Kind("recipe with numbers without bounds", 1, text=True, samples=DRAWS, read=_unbounded(images)),
        Kind("class folders, any bytes", 1, text=False, samples=[b"a/b", *_encoded([b"caf\xc3\xa9/b"])], read=_classes),
        *(Kind(f"{kind.name}, any encoding", 1, text=False, samples=_texts(kind), read=kind.read) for kind in texts),
    ]


def _images(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 8, 8, 3), np.uint8)
    for number, picture in enumerate(pixels):
        file = folder / f"class-{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder


def _texts(kind: Kind) -> list[bytes]:
    return [kind.samples[0], *_encoded(kind.samples[:2])]


def _encoded(samples: Sequence[bytes]) -> list[bytes]:
    """Texts in many encodings, and with letters in them that are hard to read, to write and to show."""
    found = []
    for sample in samples:
        text = sample.decode()
        found += [text.encode(encoding, "replace") for encoding in ENCODINGS]
        for number, letter in enumerate(LETTERS):
            middle = len(text) * (number + 1) // (len(LETTERS) + 1)
            found.append(f"{text[:middle]}{letter}{text[middle:]}".encode("utf-8", "surrogatepass"))
    return found


def _linked(place: Path, images: Path) -> Callable[[Path, bytes], None]:
    """Plants links out of a run's folder, as the bytes have it, and resumes, evaluates or extracts it.

    In half of the cases no look beforehand sees them, as if each were put there only after it.
    """
    with redirect_stdout(io.StringIO()):
        made = pretrain(load(Recipe, None, [f"data={images}", f"output={place / 'run'}", *SMALL, *SHORT]))

    def read(folder: Path, content: bytes) -> None:
        draw, own, outside = random.Random(content), folder / "run", folder / "outside"
        shutil.copytree(made, own)
        shutil.copytree(made, outside)
        (outside / ".step-000000009.partial").mkdir()
        for name in draw.sample(WRITTEN, draw.randint(1, 3) if content else 0):
            _link(own / name, draw, outside)
        before = _seen(outside)
        works: tuple[Callable[[], object], ...] = (
            lambda: pretrain(_recipe(images, own)),
            lambda: evaluate(own, load(EvaluateSettings, None, MEASURED), quiet=True),
            lambda: extract(own, load(ExtractSettings, None, [f"output={own / 'out'}", "workers=0", "overwrite=true"])),
        )
        work = draw.choice(works)
        if work is works[0]:
            (own / "done").unlink(missing_ok=True)
        try:
            with _unforeseen() if draw.random() < 0.5 else nullcontext(), redirect_stdout(io.StringIO()):
                work()
        finally:
            if _seen(outside) != before:
                raise AssertionError("what lies outside of the run's folder was changed")

    return read


def _recipe(images: Path, folder: Path) -> Recipe:
    return load(Recipe, None, [f"data={images}", f"output={folder}", *SMALL, *SHORT, "resume=true"])


def _link(file: Path, draw: random.Random, outside: Path) -> None:
    if file.is_symlink() or file.is_file():
        file.unlink()
    shutil.rmtree(file, ignore_errors=True)
    if any(parent.is_symlink() for parent in file.parents):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    there = [outside, *sorted(outside.rglob("*")), outside / "none", file.parent / "none"]
    target = draw.choice([outside / file.name, *draw.sample(there, 3)])
    file.symlink_to(os.path.relpath(target, file.parent) if draw.random() < 0.3 else target)


@contextmanager
def _unforeseen() -> Iterator[None]:
    kept = run.check_links
    run.check_links = backbone.check_links = lambda _: None
    try:
        yield
    finally:
        run.check_links = backbone.check_links = kept


def _seen(place: Path) -> dict[str, tuple[int, bytes]]:
    """All that lies in a folder: names, kinds, rights and contents."""
    return {
        str(file): (file.lstat().st_mode, file.read_bytes() if file.is_file() else b"") for file in place.rglob("*")
    }


def _unbounded(images: Path) -> Callable[[Path, bytes], None]:
    """Sets some numbers of a recipe to what no recipe has, and makes all ready for its first step."""
    entries = [entry for entry in keys(Recipe) if re.search(r"\b(int|float)\b", entry.kind)]

    def read(folder: Path, content: bytes) -> None:
        draw = random.Random(content)
        words = {word.partition("=")[0]: word for word in [f"data={images}", f"output={folder / 'run'}", *SMALL]}
        for entry in draw.sample(entries, draw.randint(1, 3) if content else 0):
            drawn = f"{draw.uniform(0, 2) * 10 ** draw.randint(-9, 12):g}"
            value = draw.choice(EXTREME) if draw.random() < 0.7 else drawn
            count = len(re.findall(r"\b(?:int|float)\b", entry.kind)) if entry.kind.startswith("[") else 0
            value = f"[{', '.join([value] * count)}]" if count else value
            for need in entry.needs:
                if need.field != "data":
                    words[need.field] = f"{need.field}={draw.choice(need.names)}"
            words[entry.key] = f"{entry.key}={value}"
        device, hardware.device = hardware.device, lambda: ROOM
        try:
            recipe = load(Recipe, None, list(words.values()))
            accelerator = start(recipe.train.batch_size, "fp32", 1)
            components = make_setup(recipe, accelerator, folder / "run", Console(quiet=True), train_step).components
            assert sum(value.nbytes for value in components.objective.state_dict().values()) <= ROOM
        finally:
            hardware.device = device

    return read


def _classes(place: Path, content: bytes) -> None:
    """Images in folders whose names are the bytes between slashes."""
    for number, name in enumerate(dict.fromkeys(content.replace(b"\0", b"").split(b"/")[:4])):
        if name in (b"", b".", b".."):
            continue
        folder = os.path.join(os.fsencode(place), name[:100])
        os.makedirs(folder, exist_ok=True)
        for image in range(2):
            pixels = np.full((8, 8, 3), 20 * number + image, np.uint8)
            with open(os.path.join(folder, b"%d.png" % image), "wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
    split = Folder(path=str(place), holdout=0.5).build()
    assert len(split.train.classes) <= 4
