"""Decoded images that are kept in a folder: made once, by one process, and the same as without it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from manyviews import cli
from manyviews.data import Folder, InMemory, Loader, Order, Split, select
from manyviews.data.decoding import files, picture_cache
from manyviews.data.decoding.decode import Decoding
from manyviews.data.decoding.files import Files
from manyviews.system import first_rank
from processes import launched, start
from stopped_runs import content, differing, stop_after

COUNT = 40
TRUNCATED = ("cat/07.png", "dog/03.png")
"""Their headers are whole."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(COUNT):
        values = np.random.default_rng(number).integers(0, 256, (22, 31, 3), np.uint8)
        file = tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number // 2:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(file)
    return tmp_path / "data"


@pytest.fixture
def broken(data: Path) -> Path:
    for name in TRUNCATED:
        (data / name).write_bytes((data / name).read_bytes()[:-900])
    (data / "dog/19.png").write_bytes(b"no image")
    return data


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded."""
    counts: Counter[str] = Counter()
    read = Decoding.read_whole

    def counted(decoding: Decoding, path: Path, opener: object = None) -> tuple[torch.Tensor, float]:
        counts[path.name] += 1
        return read(decoding, path, opener)

    monkeypatch.setattr(Decoding, "read_whole", counted)
    return counts


def build(data: Path, cache: Path | None, memory: float = 0.0, **settings: object) -> Split:
    words = {"size": 12, "max_bad": 0.5, "holdout": 0.25} | settings
    return Folder(path=str(data), memory=memory, cache=None if cache is None else str(cache), **words).build(workers=2)


def batches(images: Files, workers: int, steps: int = 9) -> list[tuple[int, list[int], list[int]]]:
    iterator = iter(Loader(images, Order(len(images), 6, seed=3), workers=workers))
    taken = [next(iterator) for _ in range(steps)]
    iterator.close()
    return [(batch.epoch, batch.ids.tolist(), batch.images.squares[0].flatten().tolist()) for batch in taken]


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_images_ids_and_the_unreadable_are_those_without_a_cache(tmp_path: Path, broken: Path, memory: float) -> None:
    plain, cached = build(broken, None, memory), build(broken, tmp_path / "kept", memory)
    again = build(broken, tmp_path / "kept", memory)
    for other in (cached, again):
        assert other.unreadable == plain.unreadable
        assert other.layout == plain.layout
        assert other.inventory is not None
        assert plain.inventory is not None
        assert other.inventory.marks() == plain.inventory.marks()
        for one, two in zip(plain[:2], other[:2], strict=True):
            assert type(one) is type(two) is (InMemory if memory else Files)
            # Without a cache, files beyond memory are cropped.
            assert (one.fingerprint == two.fingerprint) is bool(memory)
            assert list(one.names) == list(two.names)
            assert torch.equal(one.labels, two.labels)
            assert torch.equal(one.read(torch.arange(len(one))), two.read(torch.arange(len(two))))
            assert getattr(one, "failed", None) == getattr(two, "failed", None)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_those_without_a_cache(tmp_path: Path, broken: Path, workers: int) -> None:
    plain, cached = build(broken, None).train, build(broken, tmp_path / "kept").train
    assert isinstance(plain, Files)
    assert isinstance(cached, Files)
    assert batches(cached, workers) == batches(plain, workers)
    assert cached.failed == plain.failed
    assert set(plain.failed) <= {*TRUNCATED}
    assert plain.failed


def test_a_part_of_the_images_is_that_part(tmp_path: Path, data: Path) -> None:
    plain, cached = (select(build(data, cache).train, torch.tensor([9, 2, 17])) for cache in (None, tmp_path / "kept"))
    assert torch.equal(cached.read(torch.tensor([0, 1, 2, 1])), plain.read(torch.tensor([0, 1, 2, 1])))


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_each_image_is_decoded_once_for_all_times(
    tmp_path: Path, data: Path, decoded: Counter[str], memory: float
) -> None:
    for _ in range(2):
        split = build(data, tmp_path / "kept", memory)
        assert split.test is not None
        for images in split[:2]:
            images.read(torch.arange(len(images)))
        assert decoded.total() == COUNT


def test_what_it_takes_is_told_before_it_is_made(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_first: list[str] = []
    read = Decoding.read
    monkeypatch.setattr(
        Decoding, "read", lambda *args: (told_first.append(caplog.text) if not told_first else None, read(*args))[1]
    )
    build(data, tmp_path / "kept")
    assert "30 pictures of 3 × 12 × 12 take 0.00 GB there, of " in told_first[0]
    assert "that are free; they are decoded once, now" in told_first[0]
    caplog.clear()
    build(data, tmp_path / "kept")
    assert caplog.text == ""


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 30 * (3 * 12 * 12 + 8)
    free = Counter(free=needed - 1)
    monkeypatch.setattr(picture_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["free"]))
    with pytest.raises(ValueError, match=r"data\.cache=.*kept: 30 pictures .* GB are free; make room, name a folder"):
        build(data, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    free["free"] = needed
    build(data, tmp_path / "kept")


def test_after_an_interruption_the_rest_is_decoded(
    tmp_path: Path, data: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = build(data, None).train.read(torch.arange(30))
    decoded.clear()

    def interrupted(what: str, done: int, total: int) -> None:
        if what == "decoding into data.cache" and done >= 8:
            raise KeyboardInterrupt

    settings = Folder(path=str(data), size=12, memory=0, holdout=0.25, cache=str(tmp_path / "kept"))
    monkeypatch.setattr(files, "CHUNK", 4)
    with pytest.raises(KeyboardInterrupt):
        settings.build(workers=2, report=interrupted)
    assert 8 <= decoded.total() < 30
    missing = 30 - decoded.total()
    split = settings.build(workers=2)
    assert decoded.total() == COUNT
    assert f"take 0.00 GB there; the {missing} that are missing are decoded now" in caplog.text
    assert torch.equal(split.train.read(torch.arange(30)), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("size", r"shape was 30 × 3 × 12 × 12 and is 30 × 3 × 16 × 16"),
        ("background", r"background was \(255, 255, 255\) and is \(0, 0, 0\)"),
        ("bits", "bits was None and is 12"),
        ("content", "images was [0-9a-f]{64} and is [0-9a-f]{64}"),
        ("name", "images was [0-9a-f]{64} and is [0-9a-f]{64}"),
        ("decoder", "decoder was Pillow .* and is Pillow 0.1"),
    ],
)
def test_pictures_of_other_images_are_refused_with_the_way_out(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str
) -> None:
    build(data, tmp_path / "kept")
    settings = {"size": {"size": 16}, "background": {"background": "black"}, "bits": {"bits": 12}}.get(change, {})
    if change == "content":
        shutil.copy(data / "cat/01.png", data / "cat/02.png")
        shutil.copy(data / "dog/01.png", data / "dog/02.png")
    elif change == "name":
        for label in ("cat", "dog"):
            (data / label / "01.png").rename(data / label / "a.png")
    elif change == "decoder":
        monkeypatch.setattr("manyviews.data.sources.folder.DECODER", "Pillow 0.1")
    with pytest.raises(
        ValueError, match=rf"data\.cache=.*kept holds other pictures: .*{said}.*; remove the folder, or"
    ):
        build(data, tmp_path / "kept", **settings)
    shutil.rmtree(tmp_path / "kept")
    build(data, tmp_path / "kept", **settings)


@pytest.mark.parametrize("name", ["holiday.jpg", "train.npy", "sub"])
def test_a_folder_of_other_files_is_refused_and_stays_as_it_was(tmp_path: Path, data: Path, name: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / name).mkdir() if name == "sub" else (tmp_path / "kept" / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"holds other files, {name}; name a new folder"):
        build(data, tmp_path / "kept")
    assert [entry.name for entry in (tmp_path / "kept").iterdir()] == [name]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"key": 3, "unreadable": {}}', b'{"key": {}, "unreadable": {"a": 1}}']
)
def test_a_damaged_key_is_refused_with_the_way_out(tmp_path: Path, data: Path, content: bytes) -> None:
    build(data, tmp_path / "kept")
    (tmp_path / "kept/train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.json is damaged; remove the folder"):
        build(data, tmp_path / "kept")


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_picture_that_the_disk_has_damaged_is_noticed_and_decoded(
    tmp_path: Path, data: Path, decoded: Counter[str], caplog: pytest.LogCaptureFixture, memory: float
) -> None:
    expected = build(data, tmp_path / "kept", memory).train.read(torch.arange(30))
    file = tmp_path / "kept/train.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    decoded.clear()
    caplog.clear()
    images = build(data, tmp_path / "kept", memory).train
    for _ in range(2):
        assert torch.equal(images.read(torch.arange(30)), expected)
    assert set(decoded) == {"19.png"}
    assert caplog.text.count("is damaged: pictures that differ from their checksums are decoded from the images") == 1


@pytest.mark.parametrize("name", ["train.npy", "train-marks.npy"])
@pytest.mark.parametrize("harm", ["cut", "gone", "rubbish"])
def test_a_file_that_is_cut_or_gone_is_made_again(tmp_path: Path, data: Path, name: str, harm: str) -> None:
    expected = build(data, tmp_path / "kept").train.read(torch.arange(30))
    file = tmp_path / "kept" / name
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(b"rubbish" if harm == "rubbish" else file.read_bytes()[:-1])
    images = build(data, tmp_path / "kept").train
    assert torch.equal(images.read(torch.arange(30)), expected)
    assert file.stat().st_size == 128 + 30 * (432 if name == "train.npy" else 8)


def test_a_folder_that_may_not_be_written_is_used_once_it_is_whole(tmp_path: Path, data: Path) -> None:
    expected = build(data, tmp_path / "kept").train.read(torch.arange(30))
    (tmp_path / "kept/.lock").unlink(missing_ok=True)
    os.chmod(tmp_path / "kept", 0o500)
    before = sorted(entry.name for entry in (tmp_path / "kept").iterdir())
    assert torch.equal(build(data, tmp_path / "kept").train.read(torch.arange(30)), expected)
    assert sorted(entry.name for entry in (tmp_path / "kept").iterdir()) == before
    os.chmod(tmp_path / "kept", 0o700)


def test_images_of_which_none_can_be_read_leave_no_cache(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 1 image in .* cannot be read"):
        build(tmp_path / "data", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_path_that_is_a_file_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match=r"data\.cache=.*kept cannot be used: .*"):
        build(data, tmp_path / "kept")


def counting(path: Path) -> None:
    """Writes a line for each file that this process decodes."""
    read = Decoding.read

    def counted(decoding: Decoding, file: Path, opener: object = None) -> torch.Tensor:
        with path.open("a") as lines:
            lines.write(f"{file.name} {os.getpid()}\n")
        return read(decoding, file, opener)

    Decoding.read = counted


def one_of_two(data: str, folder: str) -> None:
    Accelerator(cpu=True)
    first_rank.BEAT = 0.01
    counting(Path(folder, "decoded"))
    images = build(Path(data), Path(folder, "kept")).train
    pixels = images.read(torch.arange(len(images)))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(pixels.flatten().tolist()))


def test_of_two_ranks_one_makes_it_and_both_read_it(tmp_path: Path, data: Path) -> None:
    expected = build(data, None).train.read(torch.arange(30)).flatten().tolist()
    launched(one_of_two, str(data), str(tmp_path))
    lines = (tmp_path / "decoded").read_text().splitlines()
    assert len(lines) == COUNT
    assert len({line.split()[1] for line in lines}) == 1
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def alone(number: int, data: str, folder: str) -> None:
    counting(Path(folder, "decoded"))
    build(Path(data), Path(folder, "kept"))


def test_of_two_programs_one_makes_it_while_the_other_waits(tmp_path: Path, data: Path) -> None:
    start(alone, (str(data), str(tmp_path)), count=2)
    assert len((tmp_path / "decoded").read_text().splitlines()) == COUNT
    assert (
        build(data, tmp_path / "kept")
        .train.read(torch.arange(30))
        .equal(build(data, None).train.read(torch.arange(30)))
    )


def test_a_file_that_is_lost_during_a_run_is_lost_with_a_cache_too(tmp_path: Path, data: Path) -> None:
    settings = Folder(path=str(data), size=12, memory=0, holdout=0, max_bad=0.5, cache=str(tmp_path / "kept"))
    began = settings.build().inventory
    assert began is not None
    (data / "cat/05.png").unlink()
    cached = settings.build(began=began.marks()).train
    plain = settings.model_copy(update={"cache": None}).build(began=began.marks()).train
    assert isinstance(cached, Files)
    assert isinstance(plain, Files)
    assert cached.failed == plain.failed
    assert [*cached.failed] == ["cat/05.png"]
    assert batches(cached, 2) == batches(plain, 0)
    assert cached.whole


def test_all_commands_read_it_and_learn_what_they_learn_without_it(
    tmp_path: Path, data: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [f"data={data}", "data.size=16", "data.holdout=0.25"]
    small = ["train.batch_size=10", "train.epochs=2", "train.precision=fp32", "train.threads=1", "train.log_every=1"]
    small += ["encoder.projector.hidden=16", "encoder.projector.dim=8", "views.size=16"]
    cached = [*own, "data.memory=0", f"data.cache={tmp_path / 'kept'}"]
    plain, kept = tmp_path / "plain", tmp_path / "cached"
    assert cli.pretrain([*own, *small, f"output={plain}"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            cli.pretrain([*own, *small, f"output={kept}"])
    # A run may go on with a cache that it was not begun with.
    assert cli.pretrain([*cached, *small, f"output={kept}", "resume=true"]) == 0
    assert not differing(content(plain), content(kept))
    decoded.clear()
    assert cli.evaluate([str(kept), "report=false", "maps=[]", "baselines=false", "tasks=[knn]"]) == 0
    assert cli.extract([str(kept), f"output={tmp_path / 'features'}"]) == 0
    assert cli.finetune([str(kept), f"output={tmp_path / 'tuned'}", "min_steps=2", "epochs=1", "threads=1"]) == 0
    assert decoded.total() == 0
