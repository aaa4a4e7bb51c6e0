"""A checkpoint from a stranger: it is read as it was written or passed over in a sentence."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from manyviews.run.checkpoints import Checkpoint, newest_checkpoint, restore_optimiser
from manyviews.run.checkpoints.checkpoint import FILE, MAX_BYTES, _seal
from manyviews.system.files import sha256
from small_run import save_checkpoint

ROWS = "objective-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with one checkpoint."""
    path = tmp_path_factory.mktemp("written")
    optimiser = {"state": {0: {"step": torch.tensor(3.0), "momentum": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1}]}
    parts = {"encoder": {"weight": torch.ones(2, 2)}, "objective": {"rows": torch.ones(4, 2)}}
    save_checkpoint(path, Checkpoint(7, parts, optimiser, {"images": "a"}, {"objective.rows": 4}))
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step-000000007"


def manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as somebody would who knows how it is sealed."""
    content = json.loads((folder / FILE).read_text())
    content.pop("seal")
    change(content)
    (folder / FILE).write_text(json.dumps(content | {"seal": _seal(content)}))


def known(folder: Path, *names: str) -> None:
    """Enters files into the manifest as they are now."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    manifest(folder, lambda content: content["files"].update(entries))


def passed_over(folder: Path, message: str) -> None:
    loaded, skipped = newest_checkpoint(folder.parent)
    assert loaded is None
    assert len(skipped) == 1
    assert skipped[0].startswith("step-000000007 is damaged and was passed over: ")
    assert message in skipped[0]
    assert "\n" not in skipped[0]
    assert len(skipped[0]) < 400


def test_a_sealed_manifest_is_read_again(folder: Path) -> None:
    manifest(folder, lambda content: content["facts"].update(more=[1, None, "x", {"y": float("nan")}]))
    loaded, skipped = newest_checkpoint(folder.parent)
    assert skipped == []
    assert loaded is not None
    assert loaded.metadata["more"][:3] == [1, None, "x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(step=8), "manifest.json is that of step 8"),
        (lambda content: content.update(step="7"), "should be a valid integer, at 'step'"),
        (lambda content: content.update(step=True), "at 'step'"),
        (lambda content: content.update(step=10**40), "at 'step'"),
        (lambda content: content.update(processes=10**12), "less than or equal to 16384, at 'processes'"),
        (lambda content: content.update(processes=0), "at 'processes'"),
        (lambda content: content.update(processes=9), "'objective-00001-of-00001.safetensors' is not the name"),
        (lambda content: content.update(shards={"objective.rows": 10**18}), "at 'shards.objective.rows'"),
        (lambda content: content.update(shards={"objective.rows": 10**12}), "4 rows, not the 1,000,000,000,000"),
        (lambda content: content.update(shards={"objective.other": 4}), "other"),
        (lambda content: content.update(shards={"../../x.rows": 4}), "is not the name of a checkpoint's file"),
        (lambda content: content.update(more=1), "at 'more'"),
        (lambda content: content.pop("files"), "at 'files'"),
        (lambda content: content["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "'../x' is not the name"),
        (lambda content: content["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "is not the name"),
        (
            lambda content: content["files"].update({"optimiser.pt": {"bytes": 1, "sha256": "0" * 64}}),
            "is not the name",
        ),
        (lambda content: content["files"].update({"a\x1b[2J.safetensors": {"bytes": 1, "sha256": "0" * 64}}), "x1b"),
        (lambda content: content["files"]["encoder.safetensors"].update(bytes=10**15), "bytes, not the"),
        (
            lambda content: content["files"]["encoder.safetensors"].update(bytes=-1),
            "at 'files.encoder.safetensors.bytes'",
        ),
        (lambda content: content["files"]["encoder.safetensors"].update(sha256="no"), "sha256"),
        (
            lambda content: content["files"].pop("encoder.safetensors") and content["files"].pop(ROWS),
            "not among the files",
        ),
        (lambda content: content.update(files={str(n): n for n in range(10**5)}), "100,000 entries, and at most"),
    ],
)
def test_a_manifest_that_no_run_writes_is_refused_before_anything_else_is_opened(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest(folder, change)
    passed_over(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "recursion limit"),
        ('{"facts":' * 100_000, "recursion limit"),
        ("", "not of the form"),
        ("null", "not of the form"),
        ("[1]", "not of the form"),
        ("\x00\xff", "not of the form"),
        (" " * (MAX_BYTES + 1), "has more than"),
    ],
)
@pytest.mark.parametrize("name", [FILE, "optimiser.json"])
def test_json_that_is_none_or_nests_or_swells_is_refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    if name != FILE:
        known(folder, name)
    passed_over(folder, message)


def test_a_value_that_was_changed_without_the_seal_is_found(folder: Path) -> None:
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text.replace('"images": "a"', '"images": "b"'))
    passed_over(folder, "manifest.json is not what was written")


@pytest.mark.parametrize("name", [FILE, "encoder.safetensors", "optimiser.json", ROWS])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_regular_file_is_never_opened(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    passed_over(folder, f"{name} is no regular file")


def test_a_folder_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    passed_over(folder, "it is a link")


def test_what_the_manifest_does_not_name_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in ("optimiser.pt", "scheduler.pkl", "encoder.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
    os.mkfifo(folder / "optimiser.bin")
    loaded, skipped = newest_checkpoint(folder.parent)
    assert loaded is not None
    assert skipped == []
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_place_of_tensors_is_damage(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (folder / "encoder.safetensors").write_bytes(pickle.dumps(Bomb()))
    known(folder, "encoder.safetensors")
    passed_over(folder, "encoder.safetensors cannot be read")
    assert not (tmp_path / "exploded").exists()


def test_shards_that_do_not_hold_the_rows_they_should_are_damage(folder: Path) -> None:
    save_file({"rows": torch.ones(3, 2)}, folder / ROWS)
    known(folder, ROWS)
    passed_over(folder, "3 rows, not the 4 of its share of rows")
    save_file({"rows": torch.tensor(1.0)}, folder / ROWS)
    known(folder, ROWS)
    passed_over(folder, f"{ROWS} cannot be read")


def test_an_optimiser_of_other_parameters_is_refused_in_words(folder: Path) -> None:
    tensors = load_file(folder / "optimiser.safetensors")
    save_file(tensors | {"5.momentum": torch.ones(1)}, folder / "optimiser.safetensors")
    known(folder, "optimiser.safetensors")
    passed_over(folder, "optimiser.json has no entry for the tensor '5.momentum'")
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))], momentum=0.9)
    for index, shape, message in ((-1, (2, 2), "number -1"), (1, (2, 2), "number 1"), (0, (3, 2), r"shape \(3, 2\)")):
        kept = {"state": {index: {"momentum_buffer": torch.zeros(shape)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        with pytest.raises(ValueError, match=message):
            restore_optimiser(optimiser, kept)


def test_an_optimisers_state_is_laid_out_as_its_parameters_are() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimiser = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    kept = optimiser.state_dict()
    kept["state"][0]["exp_avg"] = kept["state"][0]["exp_avg"].contiguous()
    restore_optimiser(optimiser, kept)
    assert optimiser.state[parameter]["exp_avg"].stride() == parameter.stride()
    assert torch.equal(optimiser.state[parameter]["exp_avg"], kept["state"][0]["exp_avg"])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_are_changed_anywhere_are_damage_or_make_no_difference(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "checkpoints"
    shutil.copytree(written, path)
    folder = path / "step-000000007"
    name = data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
    content = bytearray((folder / name).read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    (folder / name).write_bytes(content)
    if name != FILE and data.draw(st.booleans()):
        known(folder, name)
    loaded, skipped = newest_checkpoint(path)
    assert (loaded is None) == (len(skipped) == 1)
    shutil.rmtree(path.parent)
