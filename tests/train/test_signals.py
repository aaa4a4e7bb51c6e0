"""Signals and deaths, at every stage of the work: processes leave soon, with a sentence, and none is left behind."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import processes
from manyviews import cli
from manyviews.data.decoding.decode import Decoding
from manyviews.features import encoding
from manyviews.train import pretrain
from manyviews.train.finetune import loop
from small_run import small_run

TRAINING = [
    "quickstart",
    "train.batch_size=32",
    "train.precision=fp32",
    "train.preview=0",
    "train.threads=1",
]
FEW = ["data={photographs}", "data.size=28", "data.channels=1"]
SOON = 20.0
"""Seconds: most of them for a machine on which other tests run."""


def slow(owner: Any, name: str, reached: Path, *, seconds: float = 0.2, from_call: int = 0) -> None:
    """Makes a function take its time, and tells when it was reached."""
    original, calls = getattr(owner, name), 0

    def slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > from_call:
            reached.touch()
            time.sleep(seconds)
        return original(*arguments, **options)

    setattr(owner, name, slowly)


def slow_reading(reached: Path) -> None:
    original = encoding._read_ahead

    def slowly(*arguments: Any) -> Iterator[Any]:
        for pixels in original(*arguments):
            reached.touch()
            time.sleep(0.2)
            yield pixels

    encoding._read_ahead = slowly


STAGES: dict[str, Callable[[Path], object]] = {
    "decoding": lambda reached: slow(Decoding, "read_whole", reached, seconds=0.05),
    "training": lambda reached: slow(pretrain, "train_step", reached, from_call=2),
    "export": lambda reached: slow(pretrain, "export", reached, seconds=600),
    "reading": slow_reading,
    "group": lambda reached: [os.setsid(), slow(pretrain, "train_step", reached, from_call=2, seconds=0)],
    "fine-tuning": lambda reached: slow(loop, "cosine", reached, from_call=2),
}


def child(number: int, count: int, port: int, folder: Path, stage: str, words: Sequence[str]) -> None:
    output = os.open(folder / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    processes.hear()
    if count > 1:
        os.environ |= processes.world(number, count, port)
    STAGES[stage](folder / f"reached-{number}")
    sys.exit(getattr(cli, words[0])(words[1:]))


class Started:
    """Processes at work, in a stage that takes its time."""

    def __init__(self, folder: Path, stage: str, words: Sequence[str], count: int) -> None:
        context, port = multiprocessing.get_context("forkserver"), processes.free_port()
        self.folder, self.count = folder, count
        self.processes = [
            context.Process(target=child, args=(number, count, port, folder, stage, words)) for number in range(count)
        ]
        for process in self.processes:
            process.start()

    def when_reached(self) -> None:
        deadline = time.monotonic() + 120
        while not all((self.folder / f"reached-{number}").exists() for number in range(self.count)):
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def send(self, name: int, *numbers: int) -> None:
        for number in numbers or range(self.count):
            pid = self.processes[number].pid
            assert pid is not None
            os.kill(pid, name)

    def left(self) -> list[int | None]:
        """The exit codes, within the time that a scheduler gives."""
        deadline = time.monotonic() + SOON
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "".join((self.folder / f"{number}.txt").read_text() for number in range(self.count))


@contextmanager
def started(folder: Path, stage: str, *words: str, count: int = 1) -> Iterator[Started]:
    folder.mkdir(exist_ok=True)
    found = Started(folder, stage, words, count)
    try:
        found.when_reached()
        yield found
    finally:
        for process in found.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    small_run(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for label in ("dark", "light"):
        (folder / label).mkdir()
        for index in range(100):
            pixels = np.random.default_rng(index).integers(0, 128, (28, 28), np.uint8) + 100 * (label == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("stage", "number", "words"),
    [
        ("decoding", signal.SIGINT, ["pretrain", *TRAINING, "data={photographs}", "output={output}"]),
        ("training", signal.SIGTERM, ["pretrain", *TRAINING, "train.minutes=9", "output={output}"]),
        ("training", signal.SIGUSR1, ["pretrain", *TRAINING, "output={output}"]),
        ("reading", signal.SIGTERM, ["pretrain", *TRAINING, "train.epochs=0.0064", "output={output}"]),
        (
            "export",
            signal.SIGTERM,
            ["pretrain", *TRAINING, "train.epochs=0.0064", "train.monitor=0", "output={output}"],
        ),
        ("reading", signal.SIGUSR1, ["evaluate", "{run}"]),
        ("reading", signal.SIGTERM, ["extract", "{run}", "output={output}"]),
        ("fine-tuning", signal.SIGINT, ["finetune", "{run}", *FEW, "output={output}"]),
        ("reading", signal.SIGTERM, ["finetune", "{run}", *FEW, "output={output}"]),
    ],
)
def test_a_signal_ends_every_stage_soon_with_a_sentence(
    tmp_path: Path, run: Path, photographs: Path, stage: str, number: int, words: list[str]
) -> None:
    places = {"run": run, "photographs": photographs, "output": tmp_path / "output"}
    with started(tmp_path, stage, *(word.format(**places) for word in words)) as work:
        work.send(number)
        assert work.left() == [128 + number], work.said()
        assert len(re.findall(r"^stopped", work.said(), re.MULTILINE)) == 1, work.said()
        assert " to continue" in work.said()
        assert "Traceback" not in work.said()
    assert not (tmp_path / "output" / "done").exists()


@pytest.mark.parametrize("to", [(0, 1), (1,)], ids=["both", "one"])
@pytest.mark.parametrize("stage", ["training", "reading"])
def test_two_processes_leave_alike_also_when_one_gets_the_signal(
    tmp_path: Path, stage: str, to: tuple[int, ...]
) -> None:
    budget = "train.epochs=0.0064" if stage == "reading" else "train.epochs=1"
    words = ["pretrain", *TRAINING, budget, f"output={tmp_path / 'output'}"]
    with started(tmp_path, stage, *words, count=2) as work:
        work.send(signal.SIGUSR1, *to)
        assert work.left() == [128 + signal.SIGUSR1] * 2, work.said()
        assert work.said().count("stopped at step") == 1
        assert "Traceback" not in work.said()
    assert list((tmp_path / "output" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("stage", "words"), [("training", ["pretrain", *TRAINING]), ("reading", ["evaluate", "{run}"])]
)
def test_a_process_that_dies_ends_the_other_with_a_sentence(
    tmp_path: Path, run: Path, stage: str, words: list[str]
) -> None:
    given = [word.format(run=run) for word in words] + [f"output={tmp_path / 'output'}"] * (stage == "training")
    with started(tmp_path, stage, *given, count=2) as work:
        work.send(signal.SIGKILL, 1)
        assert work.left() == [cli.LOST_PROCESS, -signal.SIGKILL], work.said()
        assert work.said().count("another rank has died or does not respond") == 1
        assert "Traceback" not in work.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_leaves_those_that_decode_alone_until_all_is_saved(
    tmp_path: Path, number: int
) -> None:
    # As torchrun and schedulers send it. Of such images the next batch is never there yet.
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000), np.uint8)
    Image.fromarray(pixels).save(images / "0.png", compress_level=1)
    for index in range(1, 40):
        (images / f"{index}.png").hardlink_to(images / "0.png")
    data = [f"data={images}", "data.size=28", "data.channels=1", "data.memory=0"]
    words = ["pretrain", *TRAINING[1:], "train.batch_size=16", *data, f"output={tmp_path / 'output'}"]
    words.remove("train.batch_size=32")
    with started(tmp_path, "group", *words) as work:
        pid = work.processes[0].pid
        assert pid is not None
        decoding = members(pid)
        assert len(decoding) >= 3
        os.killpg(pid, number)
        assert work.left() == [128 + number], work.said()
        assert "stopped at step" in work.said()
        assert "Traceback" not in work.said()
        deadline = time.monotonic() + SOON
        while members(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert members(pid) == set()


def test_a_process_that_waits_for_one_that_never_comes_can_be_ended(tmp_path: Path) -> None:
    # The other of the two is never started, so that this one waits before any of its stages.
    port, words = processes.free_port(), ["pretrain", *TRAINING, f"output={tmp_path / 'output'}"]
    process = multiprocessing.get_context("forkserver").Process(
        target=child, args=(0, 2, port, tmp_path, "training", words)
    )
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    time.sleep(0.5)
    process.terminate()
    process.join(SOON)
    code = process.exitcode
    process.kill()
    assert code == -signal.SIGTERM
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_a_run_ends_with_the_launcher_of_one_process(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "pretrain.py"
    words = [*TRAINING, "train.log_every=1", f"output={tmp_path / 'run'}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(
            ["accelerate", "launch", str(script), *words],
            env={**os.environ, "PATH": path},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert launcher.poll() is None, (tmp_path / "said.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.terminate()
        launcher.wait()
        deadline = time.monotonic() + SOON
        while members(launcher.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert members(launcher.pid) == set()
    assert "stopped at step" in (tmp_path / "said.txt").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def members(group: int) -> set[int]:
    """The processes of a group that are alive."""
    listed = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return {int(pid) for pid, own, state in rows if int(own) == group and not state.startswith("Z")}
