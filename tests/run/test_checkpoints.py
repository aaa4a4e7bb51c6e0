"""A checkpoint comes back bit for bit, on any number of processes; and no cut, damage or full disk loses the last."""

import contextlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from manyviews.run.checkpoints import (
    Checkpoint,
    Saver,
    folder_name,
    newest_checkpoint,
    optimiser_shards,
    saving,
    writing,
)
from manyviews.run.folder import prepare
from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.train.resume import check_lengths
from processes import start
from small_run import save_checkpoint

ROWS, DIM = 11, 3
STAGES = ["save_file", "sync", "sha256"]


class Memory(nn.Module):
    """What an objective may hold: sharded buffers of several types, a sharded parameter, and state that all share."""

    def __init__(self, step: int, rows: int) -> None:
        super().__init__()
        own = distributed.share(rows)
        whole = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(step))
        self.register_buffer("rows", whole[own].bfloat16())
        self.register_buffer("ids", torch.arange(rows)[own] + step)
        self.register_buffer("pointer", torch.tensor(step))
        self.register_buffer("normaliser", torch.tensor(float("nan")))
        self.weight = nn.Parameter(whole[own].clone())
        self.gradient = whole[own] * 3
        self.lengths = {"rows": rows, "ids": rows, "weight": rows}


def checkpoint(step: int, rows: int = ROWS, *, adam: bool = False) -> Checkpoint:
    """The same global state on any number of processes, of which this one holds its part."""
    encoder, memory = nn.Linear(2, 2), Memory(step, rows)
    parameters = [encoder.weight, memory.weight, encoder.bias]
    for parameter, value in zip(parameters, (step, None, 0.5), strict=True):
        parameter.grad = memory.gradient if value is None else torch.full_like(parameter, value)
    with torch.no_grad():
        encoder.weight.fill_(step)
        encoder.bias.zero_()
    optimiser = torch.optim.AdamW(parameters) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    optimiser.step()
    shards = {f"objective.{name}": length for name, length in memory.lengths.items()}
    shards |= optimiser_shards(optimiser, [(memory.weight, rows)])
    parts = {"encoder": encoder.state_dict(), "objective": memory.state_dict()}
    return Checkpoint(
        step, parts, optimiser.state_dict(), {"seconds": 1.5, "processes": distributed.world_size()}, shards
    )


def tensors(loaded: Checkpoint) -> dict[str, Tensor]:
    named = {f"{part}.{key}": value for part, state in loaded.parts.items() for key, value in state.items()}
    for index, state in loaded.optimiser["state"].items():
        named |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return named


def same(loaded: Checkpoint | None, expected: Checkpoint) -> bool:
    """Whether two checkpoints are the same, bit for bit."""
    if loaded is None:
        return False
    one, two = tensors(loaded), tensors(expected)
    bits = [value.contiguous().flatten().view(torch.uint8) for value in (*one.values(), *(two[key] for key in one))]
    return (
        one.keys() == two.keys()
        and all(value.dtype == two[key].dtype and value.shape == two[key].shape for key, value in one.items())
        and all(torch.equal(a, b) for a, b in zip(bits[: len(one)], bits[len(one) :], strict=True))
        and loaded.optimiser["param_groups"] == expected.optimiser["param_groups"]
        and (loaded.step, loaded.shards) == (expected.step, expected.shards)
    )


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def slowly(work: Callable[..., Any]) -> Callable[..., Any]:
    def after_a_moment(*arguments: Any) -> Any:
        time.sleep(0.05)
        return work(*arguments)

    return after_a_moment


@contextlib.contextmanager
def patched(name: str, replacement: Callable[..., Any]) -> Any:
    original = getattr(writing, name)
    setattr(writing, name, replacement)
    yield original
    setattr(writing, name, original)


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


# What one process does alone.


@pytest.mark.parametrize("adam", [False, True])
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, adam: bool) -> None:
    saved = checkpoint(7, adam=adam)
    folder = save_checkpoint(tmp_path, saved)
    loaded, skipped = newest_checkpoint(tmp_path)
    assert not skipped
    assert same(loaded, saved)
    assert loaded is not None
    assert loaded.metadata == saved.metadata
    assert {file.name for file in folder.iterdir()} == {
        "encoder.safetensors",
        "objective.safetensors",
        "objective-00001-of-00001.safetensors",
        "optimiser.json",
        "optimiser.safetensors",
        "optimiser-00001-of-00001.safetensors",
        "manifest.json",
    }


def test_what_is_not_asked_for_is_neither_read_nor_verified(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, checkpoint(7))
    for file in folder.glob("o*"):
        file.unlink()
    loaded, skipped = newest_checkpoint(tmp_path, only=("encoder",))
    assert not skipped
    assert loaded is not None
    assert loaded.parts.keys() == {"encoder"}
    assert loaded.metadata["seconds"] == 1.5


@pytest.mark.parametrize(
    "file",
    [
        "encoder.safetensors",
        "objective-00001-of-00001.safetensors",
        "optimiser-00001-of-00001.safetensors",
        "optimiser.json",
        "optimiser.safetensors",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = save_checkpoint(tmp_path, checkpoint(2)) / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content[:-9] + b"!" + content[-8:])
    loaded, skipped = newest_checkpoint(tmp_path)
    assert same(loaded, checkpoint(1))
    assert "step-000000002" in skipped[0]
    assert file in skipped[0] or file == "manifest.json"


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_keeps_the_older_checkpoint_and_leaves_nothing(tmp_path: Path, stage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    with patched(stage, full), pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000001"]
    assert same(newest_checkpoint(tmp_path)[0], checkpoint(1))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, checkpoint(11), keep=0)


def test_a_checkpoint_whose_replacement_was_cut_off_is_back_with_the_next_save(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, checkpoint(3))
    whole.rename(whole.with_name(f"{whole.name}.replaced"))
    save_checkpoint(tmp_path, checkpoint(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder_name(3), folder_name(4)]


def test_other_folders_beside_the_checkpoints_are_no_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    for name in (".step-000000002.partial", "tmp", "step-notes"):
        (tmp_path / name).mkdir()
    loaded, skipped = newest_checkpoint(tmp_path)
    assert same(loaded, checkpoint(1))
    assert skipped == []


def test_shards_that_do_not_fit_the_process_or_the_state_are_refused(tmp_path: Path) -> None:
    saved = checkpoint(1)
    with pytest.raises(ValueError, match=r"objective\.rows has 11 rows here, not the 12 of 12"):
        save_checkpoint(tmp_path, saved._replace(shards={"objective.rows": ROWS + 1}))
    with pytest.raises(ValueError, match=r"objective\.queue should be spread"):
        save_checkpoint(tmp_path, saved._replace(shards={"objective.queue": ROWS}))
    assert list(tmp_path.iterdir()) == []


def test_a_memory_whose_length_follows_the_processes_is_refused_on_another_number_of_them() -> None:
    loaded = checkpoint(1)
    check_lengths(loaded, {"rows": ROWS, "ids": ROWS})
    with pytest.raises(ValueError, match=r"objective\.rows has 11 rows in the checkpoint.*has 22.*per_process=true"):
        check_lengths(loaded, {"rows": 2 * ROWS})


def killed_at_every_moment(index: int, folder: str, before: int, after: int) -> None:
    """Saves in a child process that is killed before its n-th change to the disk, for every n; in a fresh process."""
    root = Path(folder) / "checkpoints"
    moments: list[tuple[Any, str]] = [*((writing, name) for name in STAGES), (shutil, "rmtree")]
    moments += [(Path, name) for name in ("mkdir", "rename", "write_text")]
    moment, alive = 0, False
    while not alive:
        shutil.rmtree(root, ignore_errors=True)
        save_checkpoint(root, checkpoint(before), keep=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking beside threads, which sleep
            child = os.fork()
        if not child:
            left = [moment]
            for owner, name in moments:
                setattr(owner, name, _last(getattr(owner, name), left))
            save_checkpoint(root, checkpoint(after), keep=1)
            os._exit(0)
        alive = os.waitpid(child, 0)[1] == 0
        loaded, skipped = newest_checkpoint(root)
        assert skipped == [], (moment, skipped)
        assert same(loaded, checkpoint(before)) or same(loaded, checkpoint(after)), moment
        save_checkpoint(root, checkpoint(3), keep=1)
        assert [entry.name for entry in root.iterdir()] == ["step-000000003"], moment
        moment += 1
    assert moment > 15, moment


def _last(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return counted


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(1, 2, id="the older one goes"),
        pytest.param(1, 1, id="the only one is saved once more", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, before: int, after: int
) -> None:
    start(killed_at_every_moment, (str(tmp_path), before, after), count=1)


# What several processes do.


def join(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", rank=rank, world_size=size)


def pair(rank: int, name: str) -> None:
    """What two processes do: write, read what they and others wrote, fail together, find damage together."""
    folder = Path(name)
    join(rank, 2, folder)
    outcomes: dict[str, Any] = {}
    for rows in (ROWS, 1):
        save_checkpoint(folder / f"two-{rows}", checkpoint(5, rows))
        for writers in ("one", "two"):
            loaded, skipped = newest_checkpoint(folder / f"{writers}-{rows}")
            outcomes[f"{writers}-{rows}"] = same(loaded, checkpoint(5, rows)) and not skipped
    save_checkpoint(folder / "adam", checkpoint(6, adam=True))
    outcomes["adam"] = same(newest_checkpoint(folder / "adam")[0], checkpoint(6, adam=True))

    root = folder / "failing"
    save_checkpoint(root, checkpoint(1), keep=1)
    for failing in (0, 1):
        for stage in STAGES:
            original = getattr(writing, stage)
            with patched(stage, full if rank == failing else original):
                text = said(lambda: save_checkpoint(root, checkpoint(2), keep=1))
            distributed.barrier()
            there = [entry.name for entry in root.iterdir()]
            whole = same(newest_checkpoint(root)[0], checkpoint(1))
            outcomes[f"{stage} of {failing}"] = (text, there, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "publish", full)
        outcomes["publish of 0"] = said(lambda: save_checkpoint(root, checkpoint(2), keep=1))
    distributed.barrier()

    # In the middle of a run: one process waits for its disk, then fails; both go on, and the next save is sound.
    outcomes["beside"] = []
    saver = Saver(root, keep=1, warn=outcomes["beside"].append)
    for step, broken in ((3, True), (4, True), (5, False)):
        slow = slowly(full if rank == 1 and broken else writing.sha256)
        with patched("sha256", slow):
            saver.begin(checkpoint(step))
            polls = 0
            while saver.under_way:
                polls += 1
                saver.poll()
                time.sleep(0.001)
        outcomes[f"polls {step}"] = polls
    outcomes["beside ends"] = (
        same(newest_checkpoint(root)[0], checkpoint(5)),
        [entry.name for entry in root.iterdir()],
    )

    def faulty() -> None:
        with raise_on_all_ranks():
            if rank:
                raise ZeroDivisionError("a fault")
            raise ValueError("a wrong setting")

    outcomes["fault"] = said(faulty)

    for number in range(2):
        root = folder / f"damaged-{number}"
        for step in (1, 2):
            path = save_checkpoint(root, checkpoint(step))
        if rank == 0:
            file = path / f"objective-0000{number + 1}-of-00002.safetensors"
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        distributed.barrier()
        loaded, skipped = newest_checkpoint(root)
        outcomes[f"damaged {number}"] = (same(loaded, checkpoint(1)), skipped)

    outcomes["own folders"] = said(lambda: prepare(folder / "own" / str(rank), resume=False))
    outcomes["one folder"] = said(lambda: prepare(folder / "together" / "run", resume=False))
    distributed.barrier()
    outcomes["left"] = [path.name for path in (folder / "together" / "run").iterdir()]
    if rank == 0:
        (folder / "taken").mkdir()
        (folder / "taken" / "photo.jpg").touch()
    distributed.barrier()
    outcomes["taken"] = said(lambda: prepare(folder / "taken", resume=False))
    torch.save(outcomes, folder / f"pair-{rank}.pt")
    dist.destroy_process_group()


def four(rank: int, name: str) -> None:
    """What four processes read from the checkpoints of one and of two; and they write their own."""
    folder = Path(name)
    join(rank, 4, folder)
    outcomes = {}
    for rows in (ROWS, 1):
        save_checkpoint(folder / f"four-{rows}", checkpoint(5, rows))
        for writers in ("one", "two", "four"):
            loaded, skipped = newest_checkpoint(folder / f"{writers}-{rows}")
            outcomes[f"{writers}-{rows}"] = same(loaded, checkpoint(5, rows)) and not skipped
    torch.save(outcomes, folder / f"four-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for rows in (ROWS, 1):
        save_checkpoint(folder / f"one-{rows}", checkpoint(5, rows))
    start(pair, (str(folder),), count=2)
    start(four, (str(folder),), count=4)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"pair-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rows", [ROWS, 1])
def test_every_number_of_processes_reads_what_every_other_wrote(folder: Path, rows: int) -> None:
    for readers, size in (("pair", 2), ("four", 4)):
        for rank in range(size):
            outcomes = torch.load(folder / f"{readers}-{rank}.pt")
            for writers in ("one", "two", "four")[: 2 + (size == 4)]:
                assert outcomes[f"{writers}-{rows}"], f"process {rank} of {size} reads what {writers} wrote"
    for writers in ("two", "four"):
        loaded, skipped = newest_checkpoint(folder / f"{writers}-{rows}")
        assert same(loaded, checkpoint(5, rows))
        assert skipped == []


def test_what_the_optimiser_keeps_of_sharded_parameters_is_sharded_with_them(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    assert all(rank["adam"] for rank in ranks)
    path = folder / "adam" / "step-000000006"
    shards = json.loads((path / "manifest.json").read_text())["shards"]
    assert {"optimiser.1.exp_avg": ROWS, "optimiser.1.exp_avg_sq": ROWS}.items() <= shards.items()
    assert load_file(path / "optimiser.safetensors").keys() == {
        *(f"{index}.{key}" for index in (0, 2) for key in ("step", "exp_avg", "exp_avg_sq")),
        "1.step",
    }
    assert same(newest_checkpoint(folder / "adam")[0], checkpoint(6, adam=True))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_on_one_process_fails_on_all_and_keeps_the_older_checkpoint(
    ranks: list[dict[str, Any]], stage: str, failing: int
) -> None:
    for rank, outcomes in enumerate(ranks):
        text, there, whole = outcomes[f"{stage} of {failing}"]
        assert text.startswith("OSError: the checkpoint of step 2 could not be written: ")
        assert ("[Errno 28] No space left" if rank == failing else f"process {failing}: [Errno 28] No space") in text
        assert "step-000000001 stays" in text
        assert there == ["step-000000001"]
        assert whole


def test_a_save_that_fails_on_one_process_in_mid_run_is_told_once_on_all_and_the_next_one_is_sound(
    ranks: list[dict[str, Any]],
) -> None:
    for rank, outcomes in enumerate(ranks):
        failed, mended = outcomes["beside"]
        assert "step 3 could not be written: " in failed
        assert ("[Errno 28] No space" if rank else "process 1: [Errno 28] No space") in failed
        assert mended == "the checkpoint of step 5 is written, after 2 that could not be"
        assert outcomes["beside ends"] == (True, ["step-000000005"])
    assert all(ranks[0][f"polls {step}"] == ranks[1][f"polls {step}"] > 5 for step in (3, 4, 5))


def test_a_failure_at_the_last_moment_and_a_fault_reach_every_process(ranks: list[dict[str, Any]]) -> None:
    assert "could not be written: process 0: [Errno 28] No space left on device" in ranks[1]["publish of 0"]
    assert ranks[0]["fault"] == "RuntimeError: process 1: a fault"
    assert ranks[1]["fault"] == "ZeroDivisionError: a fault"


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_turns_all_processes_to_the_older_checkpoint_and_is_named(
    ranks: list[dict[str, Any]], number: int
) -> None:
    for outcomes in ranks:
        older, skipped = outcomes[f"damaged {number}"]
        assert older
        assert len(skipped) == 1
        assert "step-000000002 is damaged" in skipped[0]
        assert f"objective-0000{number + 1}-of-00002.safetensors is not what was written" in skipped[0]


def test_a_run_folder_that_not_all_processes_see_is_refused_on_all_of_them(ranks: list[dict[str, Any]]) -> None:
    for outcomes in ranks:
        assert outcomes["own folders"].startswith("ValueError: output=")
        assert "processes 1 write there" in outcomes["own folders"]
        assert outcomes["one folder"] == ""
        assert outcomes["left"] == []
        assert "holds other files" in outcomes["taken"]


def abandoned(rank: int, name: str) -> None:
    """The second of two processes is killed while it saves."""
    folder = Path(name)
    join(rank, 2, folder)
    save_checkpoint(folder / "checkpoints", checkpoint(1), keep=1)

    def die(file: Path) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    with patched("sha256", die if rank else writing.sha256):
        (folder / "told.txt").write_text(said(lambda: save_checkpoint(folder / "checkpoints", checkpoint(2), keep=1)))
    os._exit(0)


def test_a_process_killed_while_saving_makes_the_others_fail_and_not_wait(tmp_path: Path) -> None:
    processes = start(abandoned, (str(tmp_path),), count=2, join=False)
    for process in processes.processes:
        process.join(60)
    assert [process.exitcode for process in processes.processes] == [0, -signal.SIGKILL]
    assert (tmp_path / "told.txt").read_text().startswith(("RuntimeError", "DistBackendError"))
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    assert same(newest_checkpoint(tmp_path / "checkpoints")[0], checkpoint(1))
