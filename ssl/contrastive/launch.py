"""How a run starts and stops: processes, device and precision; and signals that save before they end."""

import ctypes
import os
import signal
import types
from contextlib import suppress
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState

from contrastive import distributed

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def start(batch_size: int | None, precision: Precision, threads: int | None = None) -> Accelerator:
    """The processes, the device, the precision and, on the CPU, the threads of a run.

    `batch_size` is that of all processes together; None where no batch is shared out over them.

    Raises:
        ValueError: where a launcher started several processes that do not see each other, where the strategy shards
            the encoder, where gradients are to be accumulated, and where the global batch does not divide over the
            processes.
    """
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        precision = "bf16" if bf16_pays(on_cpu) else "fp32"
    # Accelerate keeps one state for the whole process and refuses another precision, even for another run.
    AcceleratorState._reset_state()
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


class Stop:
    """While open, Ctrl-C, SIGTERM and SIGUSR1 ask the run to save and end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that ends the run, once the processes have agreed on it."""
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for name in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])):
            self._handlers[name] = signal.signal(name, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer on all of them, so that none waits for another."""
        if distributed.any_rank(self._received is not None):
            self.signal = self._received or signal.SIGTERM
        return self.signal is not None
