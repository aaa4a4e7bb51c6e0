"""What is written in a stranger's folder stays in it, whatever links lie there and whenever they were put there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from manyviews import cli
from manyviews.features import backbone
from manyviews.run import folder as run
from manyviews.system import files
from manyviews.system.writing import (
    folder_path,
    make_folder,
    open_new,
    open_there,
    remove,
    rename,
    replacing,
    write_atomic,
)
from small_run import photographs

SMALL = [
    *("data.holdout=0.3", "data.size=8", "views.size=16", "encoder.projector.hidden=8", "encoder.projector.dim=8"),
    *("train.batch_size=8", "train.workers=0", "train.save_minutes=0.00001", "train.log_every=1", "train.keep=9"),
]
MEASURED = ["tasks=[knn]", "baselines=false", "maps=[]", "workers=0"]


def seen(place: Path) -> dict[str, object]:
    """All that a folder holds: names, kinds, rights and contents."""
    files = sorted(place.rglob("*"))
    return {
        str(file.relative_to(place)): (file.lstat().st_mode, file.read_bytes() if file.is_file() else None)
        for file in [place, *files]
    }


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's, with files by the names that a run has."""
    place = tmp_path / "outside"
    for name in ("file", "model.safetensors", "config.json", "manifest.json", "step-000000001/manifest.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("precious")
    (place / "backbone-0").mkdir()
    (place / "events.out.tfevents.1.host").write_text("precious")
    (place / ".step-000000009.partial").mkdir()
    (place / ".step-000000009.partial/file").write_text("precious")
    place.chmod(0o700)
    (place / "file").chmod(0o600)
    return place


WORK: dict[str, Callable[[Path, Path], object]] = {
    "make a folder": lambda path, root: make_folder(path / "made", root),
    "make a new folder": lambda path, root: make_folder(path / "made", root, new=True),
    "make a file": lambda path, root: open_new(path / "made", root),
    "open a file": lambda path, root: open_there(path / "file", root),
    "grow a file": lambda path, root: open_there(path / "made", root, append=True),
    "rename a file": lambda path, root: rename(path / "file", path / "other", root),
    "rename out": lambda path, root: rename(root / "inside", path / "file", root),
    "remove a file": lambda path, root: remove(path / "file", root),
    "remove a folder": lambda path, root: remove(path / "step-000000001", root),
    "write a file": lambda path, root: write_atomic(path / "file", [b"other"], root),
    "give a path": lambda path, root: folder_path(path, root).__enter__(),
    "give a path to a file": lambda path, root: replacing(path / "file", root).__enter__(),
}


@pytest.mark.parametrize("by_descriptor", [True, False])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_nothing_is_done_behind_a_link(
    work: Callable[[Path, Path], object],
    by_descriptor: bool,
    outside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "BY_DESCRIPTOR", by_descriptor)
    root, before = tmp_path / "root", seen(outside)
    (root / "deep").mkdir(parents=True)
    (root / "inside").write_text("inside")
    for path in (root / "link", root / "deep" / "link"):
        path.symlink_to(outside)
        with pytest.raises(OSError, match="is a symbolic link, or lies behind one: nothing is written there"):
            work(path, root)
    with pytest.raises(OSError, match="leads out of its folder"):
        work(root / ".." / "outside", root)
    assert seen(outside) == before
    assert (root / "inside").read_text() == "inside"


def test_a_link_is_replaced_or_removed_and_what_it_leads_to_is_not(outside: Path, tmp_path: Path) -> None:
    root, before = tmp_path / "root", seen(outside)
    root.mkdir()
    (tmp_path / "way").symlink_to(root)
    for name in ("file", "step-000000001", "none"):
        (root / "link").symlink_to(outside / name)
        with pytest.raises(OSError, match="is a symbolic link"):
            open_there(root / "link", append=True)
        with pytest.raises(FileExistsError):
            open_new(root / "link")
        write_atomic(tmp_path / "way" / "link", [b"in", b"side"])
        assert (root / "link").read_bytes() == b"inside"
        remove(root / "link")
        (root / "link").symlink_to(outside / name)
        remove(root / "link")
        assert not list(root.iterdir())
    assert seen(outside) == before


def test_a_file_that_a_library_writes_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as (path, _):
            # As safetensors does.
            (path.parent / "other").write_text("whole")
            (path.parent / "other").chmod(0o600)
            (path.parent / "other").replace(path)
            assert not (tmp_path / "file").exists()
    finally:
        os.umask(umask)
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640

    def cut_off() -> None:
        with replacing(tmp_path / "file") as (_, file):
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cut_off()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "whole")]


def test_a_folder_that_is_swapped_for_a_link_meanwhile_gets_nothing(outside: Path, tmp_path: Path) -> None:
    before = seen(outside)
    make_folder(tmp_path / "root/in", tmp_path / "root")
    with replacing(tmp_path / "root/in/file", tmp_path / "root") as (path, _):
        (tmp_path / "root/in").rename(tmp_path / "root/moved")
        (tmp_path / "root/in").symlink_to(outside)
        path.write_text("whole")
    assert (tmp_path / "root/moved/file").read_text() == "whole"
    assert seen(outside) == before


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_a_regular_file_is_written_to_and_a_pipe_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"is no regular file|Is a directory"):
        open_there(tmp_path / kind, append=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has come to its end, and its images."""
    place = tmp_path_factory.mktemp("made")
    images = photographs(place / "images", 6)
    assert cli.pretrain(["quickstart", f"data={images}", f"output={place / 'run'}", *SMALL, "train.epochs=2"]) == 0
    return place / "run", images


PRETRAINED = {
    **dict.fromkeys(["backbone", "checkpoints", "tensorboard", "checkpoints/step-000000001.replaced"], "."),
    **dict.fromkeys(["checkpoints/.step-000000009.partial", "checkpoints/.step-000000003.partial"], "step-000000001"),
    **dict.fromkeys(
        [".lock", "metrics.jsonl", "images.jsonl", "unreadable.txt", "views.png", "not_finite.json"], "file"
    ),
    **dict.fromkeys([".metrics.jsonl.partial", ".metrics.jsonl.1-2.partial", ".done.partial", "config.yaml"], "file"),
    **dict.fromkeys(["backbone/model.safetensors", "backbone/config.json", "done"], "file"),
}
EVALUATED = {
    **dict.fromkeys(["features", "metrics", "metrics/mahalanobis", "tensorboard", "tensorboard/evaluation"], "."),
    **dict.fromkeys([".evaluation.lock", "evaluation.json", "outcomes.safetensors", "report.html"], "file"),
    **dict.fromkeys([".evaluation.json.1-2.partial", "evaluation.damaged.json"], "file"),
}


def test_what_a_cut_has_left_of_files_is_removed(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made[0], tmp_path / "run")
    (folder / "done").unlink()
    names = ("backbone/.model.safetensors", ".metrics.jsonl", ".views.png", ".images.jsonl", ".unreadable.txt")
    for name in names:
        (folder / f"{name}.1-00000000.partial").touch()
    words = ["quickstart", f"data={made[1]}", f"output={folder}", *SMALL, "train.epochs=2", "resume=true"]
    assert cli.pretrain(words) == 0
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the links beforehand finds any, as if they were put there only then."""
    for module in (run, backbone):
        monkeypatch.setattr(module, "check_links", lambda folder: None)


def planted(made: Path, folder: Path, name: str, target: Path) -> Path:
    shutil.copytree(made, folder)
    file = folder / name
    shutil.rmtree(file, ignore_errors=True)
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)
    return folder


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_link_that_no_look_foresaw_leads_no_resumption_out(
    name: str, made: tuple[Path, Path], outside: Path, tmp_path: Path, unforeseen: None
) -> None:
    folder = planted(made[0], tmp_path / "run", name, outside / PRETRAINED[name])
    if name != "done":
        (folder / "done").unlink()
    before = seen(outside)
    words = ["quickstart", f"data={made[1]}", f"output={folder}", *SMALL, "train.epochs=3", "resume=true"]
    assert cli.pretrain([*words, "extend=true"]) in (0, 2)
    assert seen(outside) == before


def test_a_run_whose_folders_are_links_is_refused_before_the_first_step(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    for number, name in enumerate(("backbone", "checkpoints", "tensorboard")):
        folder = planted(made[0], tmp_path / str(number), name, Path("elsewhere"))
        (folder / "elsewhere").mkdir()
        with pytest.raises(ValueError, match=f"{name} is a symbolic link; a run writes into folders of its own"):
            run.prepare(folder, resume=True)
    folder = planted(made[0], tmp_path / "lock", ".lock", Path("config.yaml"))
    config = (folder / "config.yaml").read_bytes()
    (folder / "done").unlink()
    words = ["quickstart", f"data={made[1]}", f"output={folder}", *SMALL, "train.epochs=2", "resume=true"]
    assert cli.pretrain(words) == 2
    assert (folder / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("name", EVALUATED)
def test_a_link_that_no_look_foresaw_leads_no_evaluation_out(
    name: str, made: tuple[Path, Path], outside: Path, tmp_path: Path, unforeseen: None
) -> None:
    folder = planted(made[0], tmp_path / "run", name, outside / EVALUATED[name])
    before = seen(outside)
    shown = f"report={str(name in ('report.html', 'tensorboard', 'tensorboard/evaluation')).lower()}"
    assert cli.evaluate([str(folder), *MEASURED, shown, *(["metric=mahalanobis"] if "metrics" in name else [])]) == 0
    assert seen(outside) == before
