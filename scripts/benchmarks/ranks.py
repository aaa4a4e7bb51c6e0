"""Bank, queue and NCE on 1, 2 and 4 processes: negatives, seconds, memory and traffic of each as their number grows."""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import harness
from manyviews.config import Settings
from manyviews.objectives import Bank, Population, Queue
from manyviews.system import distributed

DIM, MEBIBYTE = 128, 2**20
ROWS = (60_000, 120_000, 240_000, 480_000)
PROCESSES = (1, 2, 4)
QUEUE, QUEUE_PER_PROCESS, NOISE = 65_536, 16_384, 4_096


class Case(NamedTuple):
    """An objective over a number of images."""

    name: str
    settings: Settings
    images: int
    rows: int | None = None
    """Rows of its memory over all processes, where that is what is swept."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The numbers of processes and of rows, and the batch."""
    parser.add_argument(
        "--processes", type=int, nargs="+", default=PROCESSES, metavar="W", help="processes on this machine (1 2 4)"
    )
    rows = " ".join(f"{number}" for number in ROWS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help=f"rows of the bank ({rows})")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="images of all processes together (256)")
    parser.add_argument(
        "--storage", choices=("float32", "float16", "bfloat16"), default="float32", help="of the rows (float32)"
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Measures each case on each number of processes, each time in fresh ones."""
    smallest = min(options.rows)
    cases = [Case("exact bank", Bank(storage=options.storage), rows, rows) for rows in sorted(options.rows)]
    nce = Bank(estimator="nce", negatives=min(NOISE, smallest), storage=options.storage)
    queue = Queue(size=min(QUEUE, smallest), storage=options.storage)
    growing = Queue(size=min(QUEUE_PER_PROCESS, smallest), per_process=True, storage=options.storage)
    cases += [
        Case(f"NCE m={nce.negatives:,}", nce, smallest),
        Case(f"queue of {queue.size:,}", queue, smallest),
        Case(f"queue of {growing.size:,} on each", growing, smallest),
    ]
    rows = [_row(case, number, options) for case in cases for number in options.processes]
    notes = [
        "seconds: loss, backward and update of one step, of the slowest process; median (smallest-largest).",
        f"The batch is {options.batch} images of all processes together, one view (queue: one query and one key each);",
        f"{os.cpu_count()} cores are divided among the processes: more of them than cores only take turns.",
        "rows each: what one process holds; beyond: the peak resident memory in steps over that of a process with its",
        "rows; of both the largest. received: what reaches one process in a step, as a ring carries it.",
        *_slopes([row for row in rows if row["objective"] == "exact bank"], options.processes),
    ]
    return harness.Report(title=f"Objectives over processes, d = {DIM}, {options.storage} rows", rows=rows, notes=notes)


def _row(case: Case, processes: int, options: argparse.Namespace) -> dict[str, harness.Value]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, processes, threads, case, options.batch, options.repetitions)
        torch.multiprocessing.spawn(work, args=arguments, nprocs=processes)
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    slowest = [max(times) for times in zip(*(one["seconds"] for one in told), strict=True)]
    return {
        "objective": case.name,
        "rows": told[0]["rows"],
        "processes": processes,
        "negatives": round(sum(one["negatives"] for one in told) / processes),
        "seconds": harness.Spread.of(slowest),
        "rows each (MiB)": max(one["held"] for one in told) / MEBIBYTE,
        "beyond (MiB)": max(one["beyond"] for one in told),
        "received (MiB)": max(one["received"] for one in told) / MEBIBYTE,
    }


def work(rank: int, folder: str, processes: int, threads: int, case: Case, batch: int, repetitions: int) -> None:
    """One process: its share of the batch through the objective, timed, with its memory and traffic."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    generator = torch.Generator().manual_seed(rank)
    own = distributed.share(batch)
    asymmetric = isinstance(case.settings, Queue)
    embeddings = torch.randn(1, own.stop - own.start, DIM, generator=generator).requires_grad_()
    targets = torch.randn(1, own.stop - own.start, DIM, generator=generator) if asymmetric else None
    # What any process brings with it is no cost of the objective: the product's and the collectives' own buffers.
    _ = torch.randn(256, DIM) @ torch.randn(DIM, 256)
    distributed.gather(torch.zeros(own.stop - own.start, DIM))
    objective = case.settings.build(dim=DIM, population=Population(torch.arange(case.images)), seed=0)
    state, lengths = objective.state_dict(), objective.shards()
    held = sum(state[name].numel() * state[name].element_size() for name in lengths)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    seconds: list[float] = []
    negatives = received = 0.0
    # The first step is a warm-up, in which the memory is at its peak too.
    for step in range(repetitions + 1):
        ids = torch.randperm(case.images, generator=torch.Generator().manual_seed(step))[:batch][own]
        embeddings.grad = None
        distributed.barrier()
        start = time.perf_counter()
        with distributed.traffic() as meter:
            loss = objective(embeddings, ids, targets, step)
            loss.total.backward()
            objective.update(embeddings.detach(), ids, targets)
        seconds.append(time.perf_counter() - start)
        negatives, received = float(loss.terms["negatives"]), float(meter.received)
    beyond = harness.kibibytes(Path("/proc/self/status"), "VmHWM") / 1024 - before
    told: dict[str, Any] = {
        "seconds": seconds[1:],
        "negatives": negatives,
        "rows": max(lengths.values()),
        "held": held,
        "beyond": beyond,
        "received": received,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    dist.destroy_process_group()


def _resident() -> float:
    gc.collect()
    return harness.kibibytes(Path("/proc/self/status"), "VmRSS") / 1024


def _slopes(rows: Sequence[dict[str, Any]], processes: Sequence[int]) -> list[str]:
    """How cost and memory grow with the rows of the bank, in words."""
    lines: list[str] = []
    for number in processes:
        swept = [row for row in rows if row["processes"] == number]
        if len(swept) < 2:
            continue
        first, last = swept[0], swept[-1]
        lines.append(
            f"On {number}: {last['rows'] / first['rows']:.3g} times the rows take "
            f"{last['seconds'].median / first['seconds'].median:.3g} times the seconds; memory beyond the rows "
            f"{first['beyond (MiB)']:.0f} and {last['beyond (MiB)']:.0f} MiB."
        )
    return lines
