"""Runs that are killed, signalled and littered until they are finished all the same."""

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

from benchmarks.soaking.child import Board
from benchmarks.soaking.litter import LITTER, litter
from benchmarks.soaking.starts import (
    PATIENCE,
    Case,
    compared,
    ended,
    in_short,
    newest,
    only_thread,
    started,
    stepping,
    undisturbed,
    waiting,
    writing,
)
from manyviews import cli

STARTING = 0.8
"""Seconds in which a start has not yet come to its first step, most often."""
STEPPING = 1.0
"""Longest wait (seconds) from the first step to a fault."""
WRITING = 0.03
"""Longest wait (seconds) from when a checkpoint begins to be written to a kill."""
LAUNCHER = 5.0
"""Seconds after which a process that waits for one that never came is ended: alone it would wait for minutes."""


class Fault(NamedTuple):
    """What happens to a run, and when."""

    kind: str
    moment: str
    """starting, stepping or writing."""
    number: int = signal.SIGKILL


@dataclass
class Tally:
    """What came of one kind of fault."""

    times: int = 0
    inside: int = 0
    """Kills that found a checkpoint half written."""
    lost: list[int] = field(default_factory=list)
    """Steps that were taken again."""
    seconds: list[float] = field(default_factory=list)
    """From the signal, or the death of another process, until all processes had left."""


@dataclass
class Outcome:
    """What came of a case."""

    name: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    runs: int = 0
    starts: int = 0
    unequal: list[str] = field(default_factory=list)
    """What differs from the undisturbed run at the end, if anything does."""
    mounted: bool = True
    """Whether the full disk was a file system of its own."""
    problems: list[str] = field(default_factory=list)
    """Hangs, tracebacks, wrong exit codes, whole checkpoints that were passed over."""

    def tally(self, kind: str) -> Tally:
        """That of a kind of fault."""
        return self.tallies.setdefault(kind, Tally())


def disturb(case: Case, place: Path, seed: int) -> Outcome:
    """Runs a case undisturbed in fresh interpreters, then under faults until all are spent; compares the ends."""
    only_thread()
    draw, outcome = random.Random(f"{seed} {case.name} {case.processes}"), Outcome(case.name)
    straight = place / "straight"
    undisturbed(case, straight, place)
    faults = drawn(case, draw)
    while faults:
        outcome.runs += 1
        folder = place / f"run-{outcome.runs}"
        Disturbed(case, folder, place, draw, outcome).finish(faults)
        found = compared(straight, folder)
        if found:
            outcome.unequal.append(f"{case.name} on {case.processes}, run {outcome.runs}: {in_short(found)}")
        shutil.rmtree(folder)
    return outcome


def drawn(case: Case, draw: random.Random) -> list[Fault]:
    """The faults of a case, in the order in which they come."""
    half = ["writing"] * (case.kills // 2)
    moments = half + [draw.choice(["starting", "stepping", "stepping"]) for _ in range(case.kills - len(half))]
    faults = [Fault("kill −9", moment) for moment in moments]
    for index in range(case.signals):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[index % 3]
        faults.append(Fault(number.name, draw.choice(["starting", "stepping", "stepping", "writing"]), number))
    first = draw.randrange(len(LITTER))
    faults += [Fault(LITTER[(first + index) % len(LITTER)], "stepping") for index in range(case.litters)]
    draw.shuffle(faults)
    return faults


class Disturbed:
    """One run, from its first start to its end."""

    def __init__(self, case: Case, folder: Path, place: Path, draw: random.Random, outcome: Outcome) -> None:
        self._case, self._folder, self._place, self._draw, self._outcome = case, folder, place, draw, outcome
        self._reached, self._expected = 0, 0
        self._last: Tally | None = None
        self._damaged = False

    def finish(self, faults: list[Fault]) -> None:
        """Takes faults from the list until the run is done or no fault is left, and then lets it end."""
        while not (self._folder / "done").exists():
            fault = faults.pop() if faults else None
            board, processes = started(self._case, self._folder, self._place)
            self._outcome.starts += 1
            spent = self._attempt(fault, board, processes)
            if fault is not None and not spent:
                faults.insert(self._draw.randrange(len(faults) + 1), fault)
            if fault is None and not (self._folder / "done").exists():
                raise RuntimeError(f"{self._folder} ended before it was done:\n{self._said(0)}")

    def _attempt(self, fault: Fault | None, board: Board, processes: list[ForkProcess]) -> bool:
        """One start with its fault; whether the fault found the run alive."""
        alive, left = False, self._half_written()
        if fault is not None:
            alive = self._await(fault.moment, board, processes)
        targets = self._targets(fault)
        began = time.monotonic()
        if fault is not None and alive:
            for target in targets:
                os.kill(processes[target].pid or 0, fault.number)
        ended(processes, began + LAUNCHER if fault is not None and fault.moment == "starting" else None)
        for process in processes:
            process.join(max(0.1, began + PATIENCE - time.monotonic()) if fault is not None else None)
        seconds = time.monotonic() - began
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        self._account(board)
        if fault is None or not alive:
            self._check(fault, processes, [], bool(hung))
            return False
        self._check(fault, processes, targets, bool(hung))
        tally = self._outcome.tally(fault.kind)
        tally.times += 1
        tally.inside += bool(self._half_written() - left)
        if fault.number != signal.SIGKILL or len(targets) < len(processes):
            tally.seconds.append(seconds)
        # One that was damaged and not gone on from since is not whole.
        published = 0 if self._damaged else newest(self._folder)
        if fault.kind in LITTER and litter(fault.kind, self._folder, self._place / "images", self._draw, self._damaged):
            self._damaged, published = True, 0
        self._expected = max(published, self._expected) if published else 0
        # What is taken again after a start without a step was lost by the fault before.
        if self._last is None or board.steps()[0] >= 0:
            self._last = tally
        return True

    def _await(self, moment: str, board: Board, processes: list[ForkProcess]) -> bool:
        """Waits for the moment of a fault; false if the run ended before."""
        draw = self._draw
        if moment == "starting":
            time.sleep(draw.uniform(0, STARTING))
        else:
            stepping(board, processes)
            time.sleep(draw.uniform(0, STEPPING))
        if moment == "writing":
            checkpoints = self._folder / "checkpoints"
            for _ in waiting(lambda: writing(checkpoints), processes, time.monotonic() + 5):
                pass
            time.sleep(draw.uniform(0, WRITING))
        return all(process.is_alive() for process in processes)

    def _half_written(self) -> set[tuple[str, int]]:
        """Folders of checkpoints that are not whole: one that an earlier start has left is not one of this start."""
        return {(folder.name, folder.stat().st_mtime_ns) for folder in self._folder.glob("checkpoints/.step-*")}

    def _targets(self, fault: Fault | None) -> list[int]:
        processes = range(self._case.processes)
        if fault is None or self._case.processes == 1:
            return list(processes)
        return self._draw.choice([[number] for number in processes] + [list(processes)])

    def _account(self, board: Board) -> None:
        """Counts the steps that this start took again for the fault before it."""
        first, newest_step = board.steps()
        if first < 0:
            return
        if self._last is not None:
            self._last.lost.append(max(0, self._reached - first))
            if first < self._expected:
                self._problem(f"went on at step {first}, though a whole checkpoint of {self._expected} was there")
        self._last, self._reached, self._expected = None, newest_step, 0
        # What was damaged has been passed over, and newer ones are whole.
        self._damaged = False

    def _check(self, fault: Fault | None, processes: list[ForkProcess], targets: Sequence[int], hung: bool) -> None:
        codes = [process.exitcode for process in processes]
        if hung:
            self._problem(f"hung after {fault}: {codes}")
        done = (self._folder / "done").exists()
        for number, code in enumerate(codes):
            said = self._said(number)
            if number in targets and fault is not None and fault.number == signal.SIGKILL:
                continue
            if "Traceback" in said:
                self._problem(f"a traceback after {fault}:\n{said[-2000:]}")
            killed = fault is not None and bool(targets) and fault.number == signal.SIGKILL
            wanted = {0} if done or not targets or fault is None else {128 + fault.number, 128 + signal.SIGTERM}
            if fault is not None and fault.moment == "starting":
                # Before there is anything to save, a signal ends a process by itself, and another that waits for it is
                # ended by its launcher or says whom it has lost.
                wanted |= {-fault.number, -signal.SIGTERM, cli.LOST_PROCESS}
            if killed and code == 0 and not done:
                self._problem(f"process {number} ended with 0 after another was killed")
            if not killed and not hung and code not in wanted | ({0} if done else set()):
                self._problem(f"process {number} ended with {code} after {fault}:\n{said[-2000:]}")

    def _said(self, rank: int) -> str:
        log = self._place / f"log-{rank}"
        return log.read_text(errors="replace") if log.exists() else ""

    def _problem(self, text: str) -> None:
        self._outcome.problems.append(f"{self._case.name} on {self._case.processes}: {text}")
