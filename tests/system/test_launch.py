import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manyviews.system import distributed
from manyviews.system.launch import GPU_BACKENDS, SIGNALS, Interrupted, Stop, start
from pages import commands
from processes import launched

ROOT = Path(__file__).parents[2]
SHORT = [
    "train.batch_size=32",
    "train.epochs=0.0064",
    "train.precision=fp32",
    "train.preview=2",
    "train.monitor=0",
    "train.threads=1",
]


def in_the_docs(*parts: str) -> list[str]:
    """The commands of docs/distributed.md that hold all of the parts."""
    return [line for line in commands(ROOT / "docs" / "distributed.md") if all(part in line for part in parts)]


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    start(8, "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but 1 process is seen"):
        start(8, "fp32")


def test_gradient_accumulation_is_refused_as_a_way_to_more_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    # What `accelerate launch --gradient_accumulation_steps 4` hands to its processes.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"4 gradient accumulation steps.*train\.chunk"):
        start(8, "fp32")


def test_accumulation_is_refused_in_words_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    with pytest.raises(ValueError, match=r"auto gradient accumulation steps, which fine-tuning .* set batch_size"):
        start(None, "fp32")
    # What only reads has no gradient.
    assert start(None, "fp32", trains=False).gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", r"^DeepSpeed .* shards .* or start with plain `python`"),
        ("ACCELERATE_USE_FSDP", "True", r"^FSDP .* shards"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", r"^Megatron-LM .* shards"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"parallelism configuration .* shards"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", r"fp8 is not supported; .* train\.precision"),
        ("ACCELERATE_USE_CPU", "perhaps", r"does not start .*perhaps"),
        ("WORLD_SIZE", "two", r"^WORLD_SIZE='two' is not a number of processes"),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_what_is_asked_of_accelerate_and_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str, trains: bool
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=said) as refused:
        start(8, "fp32", trains=trains)
    assert "\n" not in str(refused.value)


def test_more_processes_than_gpus_are_refused_and_on_the_cpu_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^2 processes on this machine and 1 GPU: .* start 1, or set CUDA_VISIBLE"):
        start(8, "fp32")
    # What `accelerate launch --cpu` sets.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert start(8, "fp32").device.type == "cpu"


def test_a_local_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a scheduler sets it, without LOCAL_WORLD_SIZE.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^4 processes on this machine and 2 GPUs: .* start 2, or set CUDA_VISIBLE"):
        start(8, "fp32")


def on_two_pretended_gpus(folder: str, begun: str) -> None:
    """Starts Accelerate as on two GPUs, whose group is then one of gloo; writes what it asked for."""
    asked: list[str] = []
    init = torch.distributed.init_process_group

    def noted(backend: str, **options: Any) -> None:
        asked.append(backend)
        init("gloo", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        for module in (torch.cuda, torch.accelerator):
            patch.setattr(module, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100")
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.distributed, "init_process_group", noted)
        if begun:
            init("gloo")
            patch.setattr(torch.distributed, "get_backend_config", lambda: begun)
            with pytest.raises(ValueError, match=rf"started as {begun}, .* init_process_group\('cpu:gloo,cuda:nccl'\)"):
                start(8, "fp32")
            return
        accelerator = start(8, "fp32")
    place = distributed.rank()
    assert (accelerator.device, accelerator.num_processes) == (torch.device("cuda", place), 2)
    # On the CPU, though the device of the rank is a GPU: a GPU that is pretended holds no tensor.
    found = [distributed.counts(place), distributed.any_over_ranks(place == 1), distributed.from_first_rank(7 + place)]
    assert found == [[0, 1], True, 7]
    assert distributed.all_gather_object({"rank": place}) == [{"rank": 0}, {"rank": 1}]
    (Path(folder) / f"{place}").write_text(" ".join(asked))


def test_the_group_of_gpus_carries_tensors_of_the_cpu_too(tmp_path: Path) -> None:
    launched(on_two_pretended_gpus, str(tmp_path), "")
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == [GPU_BACKENDS, GPU_BACKENDS]


def test_a_group_that_would_make_numbers_wait_for_the_gpus_is_refused(tmp_path: Path) -> None:
    launched(on_two_pretended_gpus, str(tmp_path), "cuda:nccl")


def test_accelerates_own_compiler_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"INDUCTOR is not used; leave --dynamo_backend out; .*train\.compile=true"):
        start(8, "fp32")
    assert start(None, "fp32", trains=False).state.dynamo_plugin.backend == "NO"


def test_one_process_where_several_were_asked_for_is_refused() -> None:
    code = (
        "from manyviews.system.launch import start\n"
        "try: start(8, 'fp32')\nexcept ValueError as problem: print(problem)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--no_python"]
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    command = [*launch, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("accelerate launch was asked for several processes and has started one"), done.stderr


def test_a_signal_asks_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_at_once_whatever_is_being_done() -> None:
    code = (
        "import os, signal, time\n"
        "from manyviews.system.launch import Stop\n"
        "with Stop():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print('goes on', flush=True)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "goes on\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_waits_for_nothing_at_once(number: int) -> None:
    with pytest.raises(Interrupted) as ended, Stop(at_once=True):
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


def test_a_signal_that_nobody_asked_for_is_not_lost() -> None:
    passed: list[str] = []

    def unasked() -> None:
        with Stop():
            signal.raise_signal(signal.SIGUSR1)
        passed.append("the end")

    def failing() -> None:
        with Stop():
            signal.raise_signal(signal.SIGUSR1)
            raise ZeroDivisionError

    with pytest.raises(Interrupted) as ended, Stop(at_once=True):
        unasked()
    assert (ended.value.signal, passed) == (signal.SIGUSR1, [])
    # What went wrong is more to be told than that it was asked to end.
    with pytest.raises(ZeroDivisionError), Stop(at_once=True):
        failing()


def test_what_a_signal_breaks_in_the_middle_of_something_ends_as_the_signal_does() -> None:
    def broken() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OSError(9, "Bad file descriptor")

    with pytest.raises(Interrupted) as ended, Stop(at_once=True):
        broken()
    assert ended.value.code == 128 + signal.SIGTERM


def test_an_indivisible_batch_names_a_batch_that_divides(tmp_path: object) -> None:
    code = (
        "from manyviews.system.launch import start\n"
        "try: start(9, 'fp32')\n"
        "except ValueError as problem: assert 'use 8' in str(problem) or 'use 10' in str(problem), problem\n"
        "else: raise SystemExit('accepted')\n"
        "import torch.distributed; torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("parts", "machines"),
    [
        pytest.param(["accelerate launch", "--num_machines 2"], 2, marks=pytest.mark.slow),
        pytest.param(["torchrun", "--nnodes 2"], 2, marks=pytest.mark.slow),
        pytest.param(["torchrun --standalone", "pretrain.py"], 1, marks=pytest.mark.slow),
    ],
    ids=["accelerate, two machines", "torchrun, two machines", "torchrun"],
)
def test_the_readmes_commands_for_many_gpus_and_machines_make_one_run(
    tmp_path: Path, parts: list[str], machines: int
) -> None:
    # As they stand, but for what a machine without GPUs has to change: the numbers of processes, and who is node0.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    each = 2 // machines
    changes = {
        r"--num_processes \d+": "--num_processes 2",
        r"--nproc-per-node \d+": f"--nproc-per-node {each}",
        "node0": "127.0.0.1",
        "29500": str(port),
        r"\boutput=\S+": "",
    }
    launches = in_the_docs(*parts)
    assert len(launches) == machines
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started = []
    for command in launches:
        for pattern, replacement in changes.items():
            command = re.sub(pattern, replacement, command)
        words = [*command.split(), *SHORT, f"output={tmp_path / 'run'}"]
        started.append(
            subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    shown = "".join(process.communicate(timeout=300)[0] for process in started)
    assert (tmp_path / "run" / "done").exists(), shown
    assert "batch 32 (16 on each)" in shown
    assert "2 × cpu" in shown
