"""Of several programs that would write into one folder one does, and nothing of the others stays."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from manyviews.run.folder import prepare
from manyviews.system.folder_lock import LOCK, folder_lock


def accept() -> None:
    """Whatever the folder holds."""


def hold(folder: Path, told: Any) -> None:
    """Holds the folder in another process until it is killed; tells what came of it."""
    try:
        with folder_lock(folder, accept, print):
            (folder / "file").write_text(str(os.getpid()))
            told.put("held")
            signal.pause()
    except ValueError as problem:
        told.put(str(problem))


@contextmanager
def holders(folder: Path, count: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
    """Processes that all try to hold a folder, and what they say."""
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=hold, args=(folder, told)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes, [told.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_of_many_starts_at_once_one_holds_the_folder_and_names_itself_to_the_others(tmp_path: Path) -> None:
    with holders(tmp_path / "a" / "run", 6) as (_, told):
        assert told.count("held") == 1
        pid = (tmp_path / "a" / "run" / "file").read_text()
        others = [text for text in told if text != "held"]
        assert all("run is being written by" in text and "output=" in text for text in others)
        with (
            pytest.raises(ValueError, match=rf"process {pid} on {os.uname().nodename}, since 2"),
            folder_lock(tmp_path / "a" / "run", accept, print),
        ):
            pass
    assert sorted(path.name for path in (tmp_path / "a" / "run").iterdir()) == [LOCK, "file"]


def test_a_lock_dies_with_its_holder_and_the_file_that_it_leaves_is_none(tmp_path: Path) -> None:
    with holders(tmp_path) as (processes, _):
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join()
        assert (tmp_path / LOCK).read_text()
        with folder_lock(tmp_path, accept, print):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_start_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mistake"), folder_lock(tmp_path / "a" / "run", accept, print):
        raise ValueError("mistake")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_refused_under_the_lock_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()

    def refuse() -> None:
        raise ValueError("other files")

    with pytest.raises(ValueError, match="other files"), folder_lock(tmp_path, refuse, print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_what_a_start_that_was_killed_early_leaves_is_no_content(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / ".start-0123456789abcdef-1").touch()
    prepare(tmp_path, resume=False)


def test_the_lock_goes_along_to_a_folder_that_had_to_be_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with folder_lock(folder, accept, print) as lock_again:
        folder.rename(tmp_path / "elsewhere")
        folder.mkdir()
        lock_again()
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), folder_lock(folder, accept, print):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: FileLock, **options: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    told: list[str] = []
    monkeypatch.setattr(FileLock, "acquire", without)
    with folder_lock(tmp_path, accept, told.append):
        pass
    assert len(told) == 1
    assert "without locks: a second start" in told[0]
