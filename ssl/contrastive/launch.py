"""How a run starts and stops: processes, device and precision; and signals that save before they end."""

import ctypes
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState

from contrastive import distributed

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SHOW_CURSOR = b"\x1b[?25h"
"""What gives a terminal back its cursor, which a progress bar hides."""


def start(batch_size: int | None, precision: Precision, threads: int | None = None) -> Accelerator:
    """The processes, the device, the precision and, on the CPU, the threads of a run.

    `batch_size` is that of all processes together; None where no batch is shared out over them.

    Raises:
        ValueError: where a launcher started several processes that do not see each other, where the strategy shards
            the encoder, where gradients are to be accumulated, and where the global batch does not divide over the
            processes.
    """
    _end_with_the_launcher()
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        precision = "bf16" if bf16_pays(on_cpu) else "fp32"
    # Accelerate keeps one state for the whole process and refuses another precision, even for another run.
    AcceleratorState._reset_state()
    with _mortal():
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            # Each process keeps the batch statistics that it normalises by: nothing else is a buffer of the encoder.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    if on_cpu:
        _tune_cpu(threads or max(1, _cores() // accelerator.state.num_processes))
    processes, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:
        raise ValueError(
            f"WORLD_SIZE is {launched} but {processes} process is seen: each would train alone and overwrite the "
            "others' run; start with `accelerate launch --multi_gpu --num_processes N` (several CPU processes too) "
            "or with torchrun"
        )
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ValueError(
            f"{accelerator.distributed_type.value} shards the encoder, which the momentum twin and the export need "
            "whole; start with `accelerate launch --multi_gpu`, which is plain data parallelism"
        )
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f"accelerate was told of {accelerator.gradient_accumulation_steps} gradient accumulation steps, which add "
            "no negatives: each part of the batch would be contrasted with itself alone; leave them out, and set "
            "train.batch_size to the whole batch and train.chunk to what fits in memory"
        )
    if batch_size is not None and batch_size % processes:
        raise ValueError(
            f"train.batch_size={batch_size} is the batch of all {processes} processes together and does not divide by "
            f"them; use {max(1, round(batch_size / processes)) * processes}"
        )
    return accelerator


def bf16_pays(on_cpu: bool) -> bool:
    """Whether bf16 is faster than fp32 here: GPUs that compute in it, and CPUs that have its dot products."""
    if on_cpu:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def _mortal() -> Iterator[None]:
    """Signals end the process as they do by default: where it waits for the others, no handler would be run.

    Nothing has been begun by then that could be lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    handlers = {name: signal.signal(name, signal.SIG_DFL) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def _end_with_the_launcher() -> None:
    # Of one process, `accelerate launch` hands on no signal: one that ended it would leave the run behind, unseen. The
    # kernel (Linux) is asked to send SIGTERM when the launcher is gone; PR_SET_PDEATHSIG is 1 (prctl.h).
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tune_cpu(threads: int) -> None:
    # `accelerate launch` and torchrun set OMP_NUM_THREADS to 1 for every process, also where there is only one.
    torch.set_num_threads(threads)
    # Numbers below the normal range cost a hundred times the others, and none of them matters.
    torch.set_flush_denormal(True)
    # glibc gives large blocks back to the system after each use, and the page faults of getting them again take a
    # tenth of a step: it is told to keep them. M_MMAP_THRESHOLD is −3, M_TRIM_THRESHOLD −1 (malloc.h).
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 1 << 30)
        library.mallopt(-1, (1 << 31) - 1)


class Interrupted(SystemExit):
    """A signal asked the process to leave, and it leaves with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Stop:
    """While open, Ctrl-C, SIGTERM and SIGUSR1 ask the work to end; a second Ctrl-C ends the process at once.

    The work asks, with `agreed`, where it can save; a signal that came after it last asked is raised again in the end.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """With `at_once` nothing is waited for: `Interrupted` is raised wherever the work is."""
        self.signal: int | None = None
        """The signal that ends the run, once the processes have agreed on it."""
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
        if kind is None and self.signal is None and self._received is not None:
            signal.raise_signal(self._received)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            # Nothing is closed or waited for: what hangs on a disk or on another process would hang on.
            os.write(2, SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(128 + number)
        self._received = number
        if self._at_once:
            raise Interrupted(number)

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer on all of them, so that none waits for another."""
        self.signal = max(distributed.counts(self._received or 0)) or None
        return self.signal is not None


def lost_process(problem: BaseException) -> bool:
    """Whether an exception tells that another process has died, or was not heard of for too long."""
    if isinstance(problem, torch.distributed.DistError):
        return True
    # Gloo raises a bare RuntimeError, whose text names its source file.
    return isinstance(problem, RuntimeError) and "gloo" in str(problem)
