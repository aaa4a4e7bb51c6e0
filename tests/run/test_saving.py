"""Checkpoints are written beside training; one that fails ends nothing, and what is worth keeping stays."""

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from manyviews.run.checkpoints import (
    Checkpoint,
    Saver,
    check_finite,
    newest_checkpoint,
    not_finite,
    reading,
    room_needed,
    way_on,
    writing,
)
from manyviews.run.checkpoints.checkpoint import OVERHEAD, read_manifest


def checkpoint(step: int, *, score: float | None = None, size: int = 1000) -> Checkpoint:
    weight = torch.full((size,), float(step))
    optimiser = {"state": {0: {"step": torch.tensor(float(step)), "average": weight / 2}}, "param_groups": []}
    return Checkpoint(step, {"encoder": {"weight": weight}}, optimiser, {"score": score})


def saved(saver: Saver, *checkpoints: Checkpoint) -> None:
    for one in checkpoints:
        saver.begin(one)
        saver.finish()


def there(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir())


def names(*steps: int) -> list[str]:
    return [f"step-{step:09d}" for step in steps]


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Callable[[], None]]:
    """While it is open, and what it yields was not called, one function of writing waits."""
    gate, original = threading.Event(), getattr(writing, name)

    def waiting(*arguments: Any) -> Any:
        assert gate.wait(30)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, name, waiting)
        yield gate.set
        gate.set()


def full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def until_written(saver: Saver) -> None:
    """Polls as a run does in each step."""
    until = time.monotonic() + 30
    while saver.under_way:
        assert time.monotonic() < until
        saver.poll()
        time.sleep(0.001)


@pytest.mark.parametrize("stage", ["save_file", "sync", "sha256"])
def test_what_is_written_is_the_moment_of_begin_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saver, training = Saver(tmp_path), checkpoint(1)
    with held(monkeypatch, stage):
        saver.begin(training)
        saver.poll()
        assert saver.under_way
        assert newest_checkpoint(tmp_path) == (None, [])
        training.parts["encoder"]["weight"].fill_(torch.nan)
        training.optimiser["state"][0]["average"].fill_(torch.nan)
    until_written(saver)
    loaded, skipped = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert skipped == []
    assert loaded.parts["encoder"]["weight"].unique().tolist() == [1.0]
    assert loaded.optimiser["state"][0]["average"].unique().tolist() == [0.5]


def test_a_checkpoint_that_is_begun_while_another_is_written_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path)
    with held(monkeypatch, "sha256"):
        saver.begin(checkpoint(1))
    saver.begin(checkpoint(2))
    saver.finish()
    assert there(tmp_path) == names(1, 2)


def test_saves_that_fail_are_told_of_once_and_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[str] = []
    saver = Saver(tmp_path / "run" / "checkpoints", keep=1, warn=news.append)
    saved(saver, checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(writing, "sync", full)
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
        for step in (2, 3, 4):
            saver.begin(checkpoint(step, size=10**5))
            until_written(saver)
            assert there(saver.folder) == names(1)
    assert len(news) == 1
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left on device" in news[0]
    assert "it takes 0.9 MB, and 0.8 MB are missing" in news[0]
    assert "step-000000001 stays" in news[0]
    assert saver.failures == 3
    saver.begin(checkpoint(5))
    until_written(saver)
    assert news[1:] == ["the checkpoint of step 5 is written, after 3 that could not be"]
    assert there(saver.folder) == names(5)


def test_a_failure_between_two_steps_is_warned_of_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[str] = []
    saver = Saver(tmp_path, warn=news.append)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "sync", full)
        saver.begin(checkpoint(1))
        saver.wait()
    saver.begin(checkpoint(2))
    saver.finish()
    failed, written = news
    assert "the checkpoint of step 1 could not be written" in failed
    assert written == "the checkpoint of step 2 is written, after 1 that could not be"


def test_a_folder_that_cannot_be_made_is_told_of_like_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    news: list[str] = []
    saver = Saver(tmp_path / "checkpoints", warn=news.append)
    saver.begin(checkpoint(1))
    until_written(saver)
    (messages,) = news
    assert "could not be written" in messages
    assert "there is none before it" in messages


def test_a_disk_that_takes_no_more_fails_the_last_save_in_a_sentence(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saved(saver, checkpoint(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        saver.begin(checkpoint(2, size=10_000))
        with pytest.raises(OSError, match=r"step 2 could not be written.*File too large.*step-000000001 stays.*resume"):
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert there(tmp_path) == names(1)


def test_a_fault_of_the_program_is_raised_and_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*arguments: Any) -> None:
        raise ZeroDivisionError("a fault")

    saver = Saver(tmp_path)
    monkeypatch.setattr(writing, "save_file", faulty)
    saver.begin(checkpoint(1))
    with pytest.raises(ZeroDivisionError, match="a fault"):
        until_written(saver)
    assert there(tmp_path) == []


def test_a_save_that_is_abandoned_leaves_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.begin(checkpoint(1))
    saver.abandon()
    assert not saver.under_way
    assert there(tmp_path) == []


def test_what_must_come_before_a_checkpoint_does_and_its_failure_is_the_checkpoints(tmp_path: Path) -> None:
    saver, seen = Saver(tmp_path), []
    saver.begin(checkpoint(1), before=lambda: seen.append(there(tmp_path)))
    saver.finish()
    assert seen == [[".step-000000001.partial"]]
    saver.begin(checkpoint(2), before=full)
    with pytest.raises(OSError, match="step 2 could not be written"):
        saver.finish()
    assert there(tmp_path) == names(1)


def test_the_best_stays_until_a_better_one_comes_after_a_resume_too(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    assert saver.improves(0.0, 1)
    saved(
        saver, *(checkpoint(step, score=score) for step, score in ((1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, 0.9)))
    )
    assert there(tmp_path) == names(2, 4, 5)
    resumed = Saver(tmp_path, keep=2)
    assert not resumed.improves(0.9, 5)
    assert resumed.improves(0.91, 5)
    saved(resumed, checkpoint(6))
    assert there(tmp_path) == names(2, 5, 6)
    saved(resumed, checkpoint(7, score=0.95), checkpoint(8), checkpoint(9))
    assert there(tmp_path) == names(7, 8, 9)
    loaded, _ = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 9


def test_without_keep_best_only_the_newest_stay_and_no_score_is_a_reason_to_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, keep_best=False)
    saved(saver, checkpoint(1, score=0.9), checkpoint(2))
    assert there(tmp_path) == names(2)
    assert not saver.improves(1.0, 3)


def test_a_damaged_checkpoint_that_was_passed_over_does_not_push_out_its_successor(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1)
    saved(saver, checkpoint(9, score=0.9))
    (tmp_path / names(9)[0] / "encoder.safetensors").unlink()
    assert newest_checkpoint(tmp_path)[0] is None
    assert saver.improves(0.1, 2)
    saved(saver, checkpoint(2))
    assert there(tmp_path) == names(2)


def test_the_room_that_is_needed_is_that_of_the_files_and_no_more_than_a_little_beyond(tmp_path: Path) -> None:
    one = checkpoint(1, size=300_000)
    saver = Saver(tmp_path / "run", keep=1, keep_best=False)
    saved(saver, one)
    taken = sum(file.stat().st_size for file in (tmp_path / "run" / names(1)[0]).iterdir())
    assert taken <= room_needed(one, keep=0) <= taken + 2 * OVERHEAD
    assert room_needed(one, keep=2) == 3 * room_needed(one, keep=0)
    assert saver.room_warning(one) is None


def test_too_little_room_is_warned_of_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path / "checkpoints", keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3 * 10**6))
    messages = saver.room_warning(checkpoint(1, size=10**6))
    assert messages is not None
    assert "will take 32.5 MB, and there are 3.0 MB" in messages


def test_room_is_counted_only_when_no_file_comes_or_goes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, keep=1)
    saved(saver, checkpoint(1))
    with held(monkeypatch, "sha256") as let_go:
        saver.begin(checkpoint(2))
        threading.Timer(0.2, let_go).start()
        assert saver.room_warning(checkpoint(2)) is None
    assert not saver.under_way
    assert there(tmp_path) == names(2)


@pytest.mark.parametrize("step", [1, 2])
def test_a_reader_to_whom_a_run_beside_it_leaves_nothing_looks_again(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, original = Saver(tmp_path, keep=1), reading.verify
    saved(saver, checkpoint(1))

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(reading, "verify", original)
        saved(saver, checkpoint(step, score=0.5, size=2000))
        original(*arguments)

    monkeypatch.setattr(reading, "verify", overtaken)
    loaded, skipped = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.metadata["score"]) == (step, 0.5)
    assert not skipped


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    sound = {"encoder.weight": torch.ones(3, 3), "encoder.count": torch.tensor(2), "encoder.empty": torch.ones(0)}
    check_finite(sound, 5, tmp_path)
    broken = {**sound, "encoder.norm": torch.tensor([1.0, bad])}
    with pytest.raises(ValueError, match=r"after step 5 the weights are no longer finite \(encoder\.norm\).*no checkp"):
        check_finite(broken, 5, tmp_path)
    saved(Saver(tmp_path), checkpoint(3))
    with pytest.raises(ValueError, match=r"the newest checkpoint, step-000000003, is sound.*resume=true"):
        check_finite(broken, 5, tmp_path)


def test_a_damaged_checkpoint_is_not_called_sound(tmp_path: Path) -> None:
    saved(Saver(tmp_path), checkpoint(3), checkpoint(4))
    (tmp_path / names(4)[0] / "manifest.json").write_text("{")
    assert "step-000000003, is sound" in way_on(tmp_path)
    (tmp_path / names(3)[0] / "manifest.json").unlink()
    assert "no checkpoint" in way_on(tmp_path)


def test_checkpoints_that_another_program_removes_are_warned_of_and_the_next_one_is_written(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "run" / "checkpoints")
    saved(saver, checkpoint(1))
    shutil.rmtree(tmp_path / "run")
    assert saver.room_warning(checkpoint(2)) is None
    saved(saver, checkpoint(2))
    assert there(saver.folder) == names(2)


def test_a_checkpoint_counts_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))
    saved(Saver(tmp_path), checkpoint(1))
    (folder,) = tmp_path.iterdir()
    files = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert "manifest.json" in files
    assert {name for name, inode in files.items() if inode not in synced} == set()
    # The manifest after what it vouches for, the list of files after the files, and the new name at the end.
    order = [*(inode for name, inode in files.items() if name != "manifest.json")]
    ends = [files["manifest.json"], folder.stat().st_ino, tmp_path.stat().st_ino]
    assert [synced.index(inode) for inode in ends] == sorted(synced.index(inode) for inode in ends)
    assert max(synced.index(inode) for inode in order) < synced.index(ends[0])
    assert synced[-1] == ends[-1]


def test_a_step_that_is_saved_again_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(Saver(tmp_path), checkpoint(3, size=10))
    seen: list[Checkpoint | None] = []
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def looked(*arguments: Any, original: Callable[..., None] = original, **options: Any) -> None:
            seen.append(newest_checkpoint(tmp_path)[0])
            original(*arguments, **options)
            seen.append(newest_checkpoint(tmp_path)[0])

        monkeypatch.setattr(os, name, looked)
    saved(Saver(tmp_path), checkpoint(3, size=20))
    lengths = [None if one is None else len(one.parts["encoder"]["weight"]) for one in seen]
    assert lengths[0] == 10
    assert lengths[-1] == 20
    assert None not in lengths
    assert there(tmp_path) == names(3)


def test_the_manifest_says_what_the_checkpoint_is_of(tmp_path: Path) -> None:
    saved(
        Saver(tmp_path),
        checkpoint(3, score=0.25)._replace(metadata={"score": 0.25, "images": "a", "loss": float("nan")}),
    )
    manifest = read_manifest(tmp_path / names(3)[0])
    assert (manifest.step, manifest.processes, manifest.shards) == (3, 1, {})
    assert manifest.metadata["images"] == "a"
    assert manifest.files.keys() == {"encoder.safetensors", "optimiser.safetensors", "optimiser.json"}
    for name, file in manifest.files.items():
        assert (tmp_path / names(3)[0] / name).stat().st_size == file.bytes


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    saved(Saver(tmp_path), checkpoint(1))
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / names(1)[0]).iterdir()}
    assert modes == {tmp_path.joinpath(names(1)[0]).stat().st_mode & 0o666}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA_VISIBLE_DEVICES=0)")
def test_weights_on_a_gpu_are_checked_beside_what_lies_on_the_cpu() -> None:
    assert not_finite({"rate": torch.ones(1), "weight": torch.ones(2, device="cuda")}) == []
    assert not_finite({"rate": torch.ones(1), "weight": torch.full((2,), torch.nan, device="cuda")}) == ["weight"]
