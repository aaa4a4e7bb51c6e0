"""Starts a run (processes, device, precision) and stops it by signals."""

import ctypes
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, KwargsHandler

from manyviews.system import distributed
from manyviews.system.disk import in_words
from manyviews.system.files import shown
from manyviews.system.hardware import cores, has_instructions

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
GPU_BACKENDS = "cpu:gloo,cuda:nccl"
"""A process group of GPUs: tensors on them travel by NCCL, those on the CPU by gloo."""
SHOW_CURSOR = b"\x1b[?25h"
"""Terminal code that shows the cursor, which a progress bar hides."""
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's parallelism configuration",
}
"""Variables by which `accelerate launch` enables strategies that shard the weights."""
PLAIN = (
    "unset what asks for it, or start with plain `python`, which does not read what `accelerate config` has written, "
    "or several processes with torchrun"
)


def start(
    batch_size: int | None, precision: Precision, threads: int | None = None, *, trains: bool = True
) -> Accelerator:
    """Starts Accelerate with a precision and, on the CPU, a number of threads.

    `batch_size` is global, or None if batches are not split over ranks; precision "auto" is bf16 where it is fast.
    Accelerate's settings for training are only checked if the command `trains`.

    Raises:
        ValueError: if the launched processes do not see each other, Accelerate has unsupported settings (sharding,
            gradient accumulation, fp8, a compiler) or cannot start, or the batch does not divide over the processes.
    """
    _end_with_the_launcher()
    _check_settings_of_accelerate(with_negatives=batch_size is not None, trains=trains)
    launched = _processes_launched()
    # `accelerate launch --cpu` sets it.
    on_cpu = _is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if not on_cpu:
        _check_gpus(max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0)) + 1))
    if precision == "auto":
        precision = "bf16" if bf16_pays(on_cpu) else "fp32"
    # Accelerate's state is global and refuses another precision, even for another run.
    AcceleratorState._reset_state()
    # Each rank keeps its own batch statistics, the only buffers of the encoder.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    # Without LOCAL_RANK there is one process, for which Accelerate would take a backend as that of a group.
    if not on_cpu and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        _check_group()
        handlers.append(InitProcessGroupKwargs(backend=GPU_BACKENDS))
    try:
        with _mortal():
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no" if precision == "fp32" else precision,
                # Otherwise taken from the environment.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_backend="no",
                kwargs_handlers=handlers,
            )
    except (ImportError, ValueError, KeyError, NotImplementedError) as problem:
        raise ValueError(f"Accelerate does not start with the settings of its environment ({problem}); {PLAIN}") from (
            problem
        )
    if on_cpu:
        _tune_cpu(threads or max(1, cores() // accelerator.state.num_processes))
    processes = accelerator.num_processes
    if (launched or 1) != processes:
        raise ValueError(
            f"WORLD_SIZE is {launched} but {processes} process is seen: each would train alone and overwrite the "
            "others' run; start with `accelerate launch --multi_gpu --num_processes N` (several CPU processes too) "
            "or with torchrun"
        )
    # Accelerate sets the address if several were requested, even if, as on a CPU, it starts one.
    if processes == 1 and launched is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch was asked for several processes and has started one; start several with `accelerate "
            "launch --multi_gpu --num_processes N`, on a CPU too (without --cpu), and one with plain `python` (if "
            "it was asked for one, unset MASTER_ADDR, by which this is noticed)"
        )
    if accelerator.distributed_type == DistributedType.XLA:
        raise ValueError("torch_xla's devices (TPUs) are not supported; use CUDA or a CPU, without torch_xla")
    if batch_size is not None and batch_size % processes:
        raise ValueError(
            f"train.batch_size={batch_size} is the batch of all {processes} processes together and does not divide by "
            f"them; use {max(1, round(batch_size / processes)) * processes}"
        )
    return accelerator


def bf16_pays(on_cpu: bool) -> bool:
    """Whether the device is faster in bf16 than in fp32."""
    if on_cpu:
        return has_instructions("avx512_bf16", "amx_tile")
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _check_settings_of_accelerate(*, with_negatives: bool, trains: bool) -> None:
    for variable, name in SHARDING.items():
        if _is_set(variable):
            raise ValueError(
                f"{name} ({variable}={os.environ[variable]}) shards the weights, which the momentum twin and the "
                f"export need whole; {PLAIN}"
            )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        raise ValueError(
            "ACCELERATE_MIXED_PRECISION=fp8 is not supported; leave --mixed_precision out, and choose bf16, fp16 or "
            "fp32 by train.precision, or by precision of other commands"
        )
    if not trains:
        return
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        why = "which fine-tuning does not make: leave them out, and set batch_size to the whole batch"
        if with_negatives:
            why = (
                "which add no negatives: each part of the batch would be contrasted with itself alone; leave them out, "
                "and set train.batch_size to the whole batch and train.chunk to what fits in memory"
            )
        raise ValueError(f"accelerate was launched with {steps} gradient accumulation steps, {why}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        instead = "; pretraining compiles its encoder by train.compile=true" if with_negatives else ""
        raise ValueError(f"ACCELERATE_DYNAMO_BACKEND={backend} is not used; leave --dynamo_backend out{instead}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "on", "y", "t")


def _check_gpus(processes: int) -> None:
    """Raises ValueError for more processes than GPUs, earlier and plainer than NCCL."""
    gpus = torch.accelerator.device_count()
    if processes > gpus:
        raise ValueError(
            f"{processes} processes on this machine and {gpus} GPU{'' if gpus == 1 else 's'}: each process needs a GPU "
            f"of its own; start {gpus}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )


def _check_group() -> None:
    """Raises ValueError for a group that a program has started without a backend for the CPU."""
    if torch.distributed.is_initialized() and "cpu:" not in torch.distributed.get_backend_config():
        raise ValueError(
            f"the process group was started as {torch.distributed.get_backend_config()}, where numbers and objects "
            f"would wait for the GPUs; start it by init_process_group({GPU_BACKENDS!r}), or leave that to manyviews"
        )


def _processes_launched() -> int | None:
    """WORLD_SIZE as a launcher sets it; None without one."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"WORLD_SIZE={text!r} is not a number of processes; unset it, or start with a launcher")
    return int(text)


@contextmanager
def _mortal() -> Iterator[None]:
    """Restores default signal handlers: Python's do not run while a process waits."""
    if _processes_launched() in (None, 1):
        yield
        return
    handlers = {name: signal.signal(name, signal.SIG_DFL) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def _end_with_the_launcher() -> None:
    # With one process, `accelerate launch` forwards no signal and would leave the run behind. The kernel (Linux) is
    # asked to send SIGTERM when the launcher is gone; PR_SET_PDEATHSIG is 1 (prctl.h).
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)


def _tune_cpu(threads: int) -> None:
    # `accelerate launch` and torchrun set OMP_NUM_THREADS=1, even for a single process.
    torch.set_num_threads(threads)
    # Denormal numbers are a hundred times slower, and do not matter.
    torch.set_flush_denormal(True)
    # glibc returns large blocks to the system after each use; the page faults take a tenth of a step. M_MMAP_THRESHOLD
    # is −3, M_TRIM_THRESHOLD −1 (malloc.h).
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 1 << 30)
        library.mallopt(-1, (1 << 31) - 1)


class Interrupted(SystemExit):
    """Exit by a signal, with the status 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Stop:
    """Handles Ctrl-C, SIGTERM and SIGUSR1 while open; a second Ctrl-C exits at once.

    The work polls `agreed` where it can save; a later signal is raised again at the end. With `at_once`, `Interrupted`
    is raised immediately.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.signal: int | None = None
        """The signal that ends the run, on all ranks."""
        self._at_once = at_once
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for name in SIGNALS:
            self._handlers[name] = signal.signal(name, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        if self._received is None or self.signal is not None:
            return
        if kind is None:
            signal.raise_signal(self._received)
        elif self._at_once and not issubclass(kind, Interrupted):
            # Raised anywhere, it may have been turned into another exception.
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            # Closes nothing: a hanging disk or process would block.
            os.write(2, SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(128 + number)
        self._received = number
        if self._at_once:
            raise Interrupted(number)

    def agreed(self) -> bool:
        """Whether any rank has received a signal; collective."""
        self.signal = max(distributed.counts(self._received or 0)) or None
        return self.signal is not None


def lost_process(problem: BaseException) -> bool:
    """Whether an exception means that another process has died or does not respond."""
    if isinstance(problem, torch.distributed.DistError):
        return True
    # Gloo raises a RuntimeError with the name of its source file.
    return isinstance(problem, RuntimeError) and "gloo" in str(problem)


def in_a_line(problem: BaseException) -> str:
    """Formats an exception as one line, with its type unless it is a ValueError or OSError."""
    text = in_words(problem) if isinstance(problem, OSError) else str(problem)
    line = shown(" ".join(text.split())) or "no reason is given"
    return line if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {line}"
