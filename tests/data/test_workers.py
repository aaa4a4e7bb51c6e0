"""Where processes cannot be started as they should be: the same batches come, and nothing is left behind."""

import errno
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_loader import equal, folder, images, take, trapped

from manyviews.data import Loader, Order
from manyviews.data.decoding.files import Files
from manyviews.data.worker_process import Decoder, Request
from manyviews.data.workers import Packed

RUNS = """
import sys
{before}
from manyviews.data import Folder, Loader, Order
images = Folder(path=sys.argv[1], size=80, memory=0).build(workers=2).train
for step, batch in enumerate(Loader(images, Order(len(images), 4, 0), workers=2)):
    if step == 5:
        break
print(step, len(batch.ids))
"""
FEW_FILES = """
import os, resource, threading
import manyviews.data
started = threading.Thread(target=print)
# One for the packed images; two threads that decode at once hold a folder and a file each. A process takes more.
most = len(os.listdir("/proc/self/fd")) + 5
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
"""


def refuse_processes(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    start, begun = multiprocessing.process.BaseProcess.start, [0]

    def limited(process: multiprocessing.process.BaseProcess) -> None:
        begun[0] += 1
        if begun[0] > first:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", limited)


@pytest.mark.parametrize("processes", [0, 1])
def test_threads_do_the_work_of_processes_that_cannot_be_started(tmp_path, monkeypatch, caplog, processes):
    straight = take(Loader(images(folder(tmp_path), memory=1), Order(13, 4, 1)), 7)
    refuse_processes(monkeypatch, processes)
    assert equal(take(Loader(images(tmp_path), Order(13, 4, 1), workers=2), 7), straight)
    said = "could not be started (BlockingIOError: [Errno 11] Resource temporarily unavailable): a thread of this one"
    assert caplog.text.count(said) == 2 - processes
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("threads", [0, 1])
def test_those_do_the_work_that_could_be_started(tmp_path, monkeypatch, threads):
    straight = take(Loader(images(folder(tmp_path), memory=1), Order(13, 4, 1)), 7)
    start, begun = threading.Thread.start, [0]

    def limited(thread: threading.Thread) -> None:
        begun[0] += thread.name.startswith("decode")
        if begun[0] > threads:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert equal(take(Loader(images(tmp_path), Order(13, 4, 1), workers=2), 7), straight)


class Fragile(Files):
    """Images that no other process can unpickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return burst, ()


def burst() -> None:
    os._exit(7)


def test_a_thread_does_the_work_of_a_process_that_ends_before_it_began(tmp_path, caplog):
    disk, order = images(folder(tmp_path)), Order(13, 4, 1)
    straight = take(Loader(disk, order), 5)
    assert equal(take(Loader(Fragile(**vars(disk)), order, workers=2), 5), straight)
    assert caplog.text.count("it ended before it began, exit status 7") == 2


@pytest.mark.slow
def test_a_thread_that_never_reads_a_file_to_its_end_is_an_error_that_names_it(tmp_path, monkeypatch):
    disk = trapped(folder(tmp_path), "3.png")
    refuse_processes(monkeypatch, 0)
    with pytest.raises(TimeoutError, match=r"for 2 seconds; being read: .*/3\.png"):
        take(Loader(disk, Order(13, 13, 0), workers=1, timeout=2.0), 1)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGBUS, "SIGBUS"), (signal.SIGSEGV, "SIGSEGV")])
def test_what_killed_a_process_is_named_at_once(tmp_path, number, name):
    batches = iter(Loader(images(folder(tmp_path)), Order(13, 13, 0), workers=1))
    next(batches)
    (child,) = multiprocessing.active_children()
    began = time.monotonic()
    os.kill(child.pid, number)
    with pytest.raises(ChildProcessError, match=rf"died \(killed by {name}\).*; fewer workers"):
        list(batches)
    assert time.monotonic() - began < 20


def test_a_data_set_is_in_memory_once_for_all_processes_and_comes_whole(tmp_path):
    disk = images(folder(tmp_path))
    packed = Packed(Decoder(disk, None), 2)
    process, connection = packed.start_process(1)
    try:
        assert connection.recv_bytes() == b"ready"
        connection.send(Request([3, 3, 11], 0))
        assert connection.recv() == ([3, 3, 11], [])
        # Names, states and labels are no part of what each process is sent.
        assert len(packed._content) < 3_000
        assert packed.marked(1) == -1
    finally:
        process.kill()
        process.join()
        packed.close()


def program(tmp_path: Path, before: str = "") -> tuple[list[str], Path]:
    """A program that has no `if __name__ == "__main__":`, and its images."""
    place, script = tmp_path / "images", tmp_path / "program.py"
    place.mkdir()
    script.write_text(RUNS.format(before=before))
    return [sys.executable, "-W", "error::ResourceWarning", str(script), str(folder(place))], place


def test_no_guard_no_room_for_shared_memory_and_a_long_path_for_temporary_files_are_no_hindrance(tmp_path):
    # Of shared memory and files of any kind no process may write a whole batch: 4 × 3 × 80 × 80 bytes.
    command, _ = program(tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))")
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    environment = os.environ | {"TMPDIR": str(long)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 4\n", "")
    assert not list(long.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_too_few_open_files_for_processes_are_enough_for_threads(tmp_path):
    command, _ = program(tmp_path, FEW_FILES)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "5 4\n"), done.stderr
    assert "Too many open files" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a read that never ends")
def test_no_process_outlives_one_that_is_killed(tmp_path):
    # One of those that decode hangs in a read, and hears nothing of its pipe.
    script = tmp_path / "program.py"
    (tmp_path / "images").mkdir()
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "from pathlib import Path\n"
        "from test_loader import trapped\n"
        "from manyviews.data import Loader, Order\n"
        "batches = iter(Loader(trapped(Path(sys.argv[1]), '3.png'), Order(13, 1, 0), workers=2))\n"
        "for _ in range(2):\n"
        "    next(batches)\n"
        "    print('a batch', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, str(script), str(folder(tmp_path / "images"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a batch\n"
        assert len(members(process.pid)) >= 3
        process.kill()
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []


def members(group: int) -> list[str]:
    """The processes of a group that are alive."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if re.match(rf" *{group} +[^Z]", line)]
