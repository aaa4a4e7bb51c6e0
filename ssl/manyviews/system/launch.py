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
from accelerate.utils import GradientAccumulationPlugin

from manyviews.system import distributed
from manyviews.system.cpu import cores, has_instructions
from manyviews.system.disk import in_words
from manyviews.system.files import shown

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SHOW_CURSOR = b"\x1b[?25h"
"""What gives a terminal back its cursor, which a progress bar hides."""
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's parallelism configuration",
}
"""What `accelerate launch` sets where a strategy is asked for that spreads the weights over the processes."""
PLAIN = (
    "unset what asks for it, or start with plain `python`, which does not read what `accelerate config` has written, "
    "or several processes with torchrun"
)


def start(
    batch_size: int | None, precision: Precision, threads: int | None = None, *, trains: bool = True
) -> Accelerator:
    """The processes, the device, the precision and, on the CPU, the threads of a run.

    `batch_size` is that of all processes together; None where no batch is shared out over them. Settings of Accelerate
    that are for training alone are ignored where nothing `trains`.

    Raises:
        ValueError: where a launcher started several processes that do not see each other, or one where several were
            asked for, where Accelerate is set to what is not supported (sharding, gradient accumulation, fp8, a
            compiler of its own) or cannot start, and where the global batch does not divide over the processes.
    """
    _end_with_the_launcher()
    _check_settings_of_accelerate(with_negatives=batch_size is not None, trains=trains)
    launched = _processes_launched()
    # `accelerate launch --cpu` sets it.
    on_cpu = _is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if not on_cpu:
        _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if precision == "auto":
        precision = "bf16" if bf16_pays(on_cpu) else "fp32"
    # Accelerate keeps one state for the whole process and refuses another precision, even for another run.
    AcceleratorState._reset_state()
    try:
        with _mortal():
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no" if precision == "fp32" else precision,
                # Otherwise the environment would be asked for both.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_backend="no",
                # Each process keeps the batch statistics that it normalises by: nothing else is a buffer of the
                # encoder.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
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
    # Accelerate sets the address where several are asked for, also where, as on a CPU, it then starts one.
    if processes == 1 and launched is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch was asked for several processes and has started one; start several with `accelerate "
            "launch --multi_gpu --num_processes N`, on a CPU too (without --cpu), and one with plain `python` (if "
            "it was asked for one, unset MASTER_ADDR, by which this is noticed)"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise _sharded(accelerator.distributed_type.value)
    if accelerator.distributed_type == DistributedType.XLA:
        raise ValueError("torch_xla's devices (TPUs) are not supported; use CUDA or a CPU, without torch_xla")
    if batch_size is not None and batch_size % processes:
        raise ValueError(
            f"train.batch_size={batch_size} is the batch of all {processes} processes together and does not divide by "
            f"them; use {max(1, round(batch_size / processes)) * processes}"
        )
    return accelerator


def bf16_pays(on_cpu: bool) -> bool:
    """Whether bf16 is faster than fp32 here: GPUs that compute in it, and CPUs that have its dot products."""
    if on_cpu:
        return has_instructions("avx512_bf16", "amx_tile")
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _check_settings_of_accelerate(*, with_negatives: bool, trains: bool) -> None:
    """Refuses what the environment, or `accelerate config` by its launcher, asks for and nobody would get."""
    for variable, name in SHARDING.items():
        if _is_set(variable):
            raise _sharded(f"{name} ({variable}={os.environ[variable]})")
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
        raise ValueError(f"accelerate was told of {steps} gradient accumulation steps, {why}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        instead = "; pretraining compiles its encoder by train.compile=true" if with_negatives else ""
        raise ValueError(f"ACCELERATE_DYNAMO_BACKEND={backend} is not used; leave --dynamo_backend out{instead}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "on")


def _check_gpus(processes: int) -> None:
    """Refuses more processes than GPUs on this machine, which NCCL would do by a stack trace."""
    gpus = torch.accelerator.device_count()
    if processes > gpus:
        raise ValueError(
            f"{processes} processes on this machine and {gpus} GPU{'' if gpus == 1 else 's'}: each process needs a GPU "
            f"of its own; start {gpus}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )


def _sharded(name: str) -> ValueError:
    return ValueError(f"{name} shards the weights, which the momentum twin and the export need whole; {PLAIN}")


def _processes_launched() -> int | None:
    """How many processes a launcher says it has started; None without one."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"WORLD_SIZE={text!r} is not a number of processes; unset it, or start with a launcher")
    return int(text)


@contextmanager
def _mortal() -> Iterator[None]:
    """Signals end the process as they do by default: where it waits for the others, no handler would be run.

    Nothing has been begun by then that could be lost.
    """
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
    # Of one process, `accelerate launch` hands on no signal: one that ended it would leave the run behind, unseen. The
    # kernel (Linux) is asked to send SIGTERM when the launcher is gone; PR_SET_PDEATHSIG is 1 (prctl.h).
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)


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
        if self._received is None or self.signal is not None:
            return
        if kind is None:
            signal.raise_signal(self._received)
        elif self._at_once and not issubclass(kind, Interrupted):
            # Raised in the middle of anything, it may come out as another exception.
            raise Interrupted(self._received)

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


def in_a_line(problem: BaseException) -> str:
    """What an exception says, on one line, with its kind where that is no plain ValueError or OSError."""
    text = in_words(problem) if isinstance(problem, OSError) else str(problem)
    said = shown(" ".join(text.split())) or "no reason is given"
    return said if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {said}"
