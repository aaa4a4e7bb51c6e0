"""A run goes on though images of it are lost, under the same ids; other changes of its images are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_extend import images, recipe, stopped

from manyviews.data import Folder
from manyviews.data.decoding.files import Files
from manyviews.recipe import Recipe
from manyviews.run.checkpoints import newest_checkpoint
from manyviews.run.folder import read_metrics
from manyviews.train import pretrain as loop
from manyviews.train.pretrain import pretrain

WORDS = ("objective=bank", "data.max_bad=0.05")


def run_of(tmp_path: Path, data: Path, *words: str) -> Recipe:
    return recipe(tmp_path / "run", data, *WORDS, *words)


def unreadable(run: Path) -> list[str]:
    return [line.partition("\t")[0] for line in (run / "unreadable.txt").read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "data")


@pytest.mark.parametrize("memory", [2, 0])
def test_an_image_that_is_removed_between_two_sessions_is_passed_over_and_all_others_keep_their_ids(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], memory: int
) -> None:
    word = f"data.memory={memory}"
    run = stopped(monkeypatch, 4, run_of(tmp_path, data, word))
    before, _ = newest_checkpoint(run / "checkpoints")
    (data / "03.png").unlink()
    seen: list[tuple[str, ...]] = []
    original = loop.train_step

    def look(components: loop.Components, batch: torch.Tensor, ids: torch.Tensor, epoch: int, step: int) -> object:
        seen.append(tuple(ids.tolist()))
        return original(components, batch, ids, epoch, step)

    monkeypatch.setattr(loop, "train_step", look)
    stopped(monkeypatch, 1, run_of(tmp_path, data, word, "resume=true"))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("of the images that the run was started with, 1 removed (03.png): they are passed over") == 1
    pretrain(run_of(tmp_path, data, word, "resume=true"))
    after, _ = newest_checkpoint(run / "checkpoints")
    assert before is not None
    assert after is not None
    assert before.metadata["images"] == after.metadata["images"]
    rows = [found.parts["objective"]["rows"] for found in (before, after)]
    assert len(rows[0]) == len(rows[1]) == 24
    # Its row stays as it was, and its place in a batch is the next image's.
    assert torch.equal(rows[0][3], rows[1][3])
    assert all(3 not in ids and len(ids) == 8 for ids in seen)
    assert unreadable(run) == ["03.png"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    pretrain(run_of(tmp_path, data, word, "resume=true"))
    assert "finished: nothing is left to do" in capsys.readouterr().out


def removed(file: Path) -> None:
    file.unlink()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def replaced(file: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(file)


@pytest.mark.parametrize("meddle", [removed, cut_short, replaced])
def test_what_a_run_has_seen_go_ends_no_resumption(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, meddle: Callable[[Path], None]
) -> None:
    made = run_of(tmp_path, data, "data.memory=0")
    original, steps = loop.train_step, iter(range(100))

    def later(*arguments: object) -> object:
        if next(steps) == 1:
            meddle(data / "05.png")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", later)
        run = stopped(monkeypatch, 5, made)
    assert unreadable(run) == ["05.png"]
    pretrain(run_of(tmp_path, data, "data.memory=0", "resume=true"))
    assert (run / "done").exists()
    assert unreadable(run) == ["05.png"]


@pytest.mark.parametrize("memory", [2, 0])
def test_other_changes_are_refused_by_name(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    word = f"data.memory={memory}"
    stopped(monkeypatch, 4, run_of(tmp_path, data, word))
    kept = (data / "07.png").read_bytes()
    replaced(data / "07.png")
    replaced(data / "99.png")
    (data / "01.png").unlink()
    with pytest.raises(ValueError, match=r"started with: 1 added \(99\.png\), 1 replaced \(07\.png\); ids would mean"):
        pretrain(run_of(tmp_path, data, word, "resume=true"))
    (data / "99.png").unlink()
    (data / "07.png").write_bytes(kept)
    for name in ("02.png", "04.png"):
        (data / name).unlink()
    with pytest.raises(ValueError, match=r"3 of 24 images .*more than data\.max_bad=0\.05 allows(.|\n)*01\.png"):
        pretrain(run_of(tmp_path, data, word, "resume=true"))
    allowed = recipe(tmp_path / "run", data, "objective=bank", "data.max_bad=0.2", word, "resume=true")
    pretrain(allowed)


def test_what_is_held_out_does_not_change_when_an_image_of_its_class_is_lost(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        images(tmp_path / "data" / name, 16, first=20 * index)
    source = Folder(path=str(tmp_path / "data"), size=16, holdout=0.16, max_bad=0.1)
    began = source.build()
    assert began.test is not None
    assert began.inventory is not None
    known = began.inventory.marks()
    assert known.keys() == {*began.train.names, *began.test.names}
    gone = [began.train.names[4], began.test.names[1]]
    for name in gone:
        (tmp_path / "data" / name).unlink()
    now = source.build(began=known)
    assert isinstance(now.train, Files)
    assert now.test is not None
    assert list(now.train.names) == list(began.train.names)
    assert list(now.test.names) == list(began.test.names)
    assert (now.train.fingerprint, now.test.fingerprint) == (began.train.fingerprint, began.test.fingerprint)
    assert now.train.failed.keys() == {gone[0]}
    others = torch.tensor([index for index in range(len(began.train)) if index != 4])
    assert torch.equal(now.train.read(others), began.train.read(others))


def test_a_damaged_list_of_images_is_named(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(monkeypatch, 4, run_of(tmp_path, data))
    lines = [json.loads(line) for line in (run / "images.jsonl").read_text().splitlines()]
    assert [name for name, _ in lines] == [f"{index:02d}.png" for index in range(24)]
    (run / "images.jsonl").write_text('["00.png", ""]\n["01.png", "1f"]\n')
    (data / "01.png").unlink()
    with pytest.raises(ValueError, match=r"images\.jsonl, line 2: it holds no name"):
        pretrain(run_of(tmp_path, data, "resume=true"))
