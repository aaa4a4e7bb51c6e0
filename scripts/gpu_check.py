"""Checks this project on a GPU and measures it, in nine stages: `python scripts/gpu_check.py --output FOLDER`.

Each stage has a limit of its own and a file FOLDER/N-NAME.json, written anew with every figure. The same command goes
on where an earlier one stopped: a stage that is done for this device and commit is not repeated. One process does the
stages; if a stage exceeds its limit or crashes, it is ended, and another one goes on with the next stage. At the end
come a table with the goals beside, and FOLDER/table.md. The exit status is 1 if a check fails or a stage does not end.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
START = 180.0
"""Seconds that a process has to import its modules."""


ENDING = 30.0
"""Seconds that a process has to end."""
PATIENCE = 5
"""Times the limits of a GPU on a CPU, which others may use too."""


class Stage(NamedTuple):
    """A module of gpu_checks/ and the seconds it has on a GPU."""

    name: str
    limit: float
    title: str


STAGES = {
    1: Stage("ceilings", 15, "ceilings of the machine"),
    2: Stage("equality", 75, "the GPU computes what the CPU computes"),
    3: Stage("resume", 60, "an interrupted run ends with the same bits"),
    4: Stage("waits", 70, "host waits and launches of a step"),
    5: Stage("training", 130, "pretraining, from the encoder alone to the whole run"),
    6: Stage("engine", 40, "softmax over many candidates"),
    7: Stage("decoding", 25, "decoding on the machine's cores"),
    8: Stage("views", 20, "views"),
    9: Stage("evaluation", 45, "kNN and probe of 1.28 million features"),
}
Record = dict[str, Any]


def main(args: Sequence[str]) -> int:
    """Runs the stages, prints the table, and returns the exit status."""
    options = _parser().parse_args(args)
    if options.worker is not None:
        _work(options.stages, options.device, options.output, options.worker)
        return 0
    output: Path = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    commit, records = _commit(), _read(output)
    todo = [
        number
        for number in sorted({*options.stages})
        if options.again or not _is_done(records.get(number), options.device, commit)
    ]
    while todo:
        begun = _run(todo, options.device, output, commit)
        if not begun:
            print(f"no stage could begin; the end of {output / 'log.txt'}:", file=sys.stderr)
            print("\n".join((output / "log.txt").read_text("utf-8").splitlines()[-5:]), file=sys.stderr)
            return 1
        records |= {record["stage"]: record for record in begun}
        todo = todo[len(begun) :]
    shown = [records[number] for number in sorted({*options.stages})]
    _show(shown, output / "table.md")
    return 0 if all(record["status"] == "done" and not failing(record) for record in shown) else 1


def failing(record: Record) -> list[str]:
    """The checks of a stage that do not hold."""
    return [row["what"] for row in record["rows"] if row["check"] and row["holds"] is False]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Checks this project on a GPU and measures it, in nine stages.", allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs all stages in small (cuda)")
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=list(STAGES), default=list(STAGES), metavar="N", help="1 to 9 (all)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER", help="for the files")
    parser.add_argument("--again", action="store_true", help="repeat stages that are done")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def _run(todo: Sequence[int], device: str, output: Path, commit: str) -> list[Record]:
    """Lets one process do the stages, until all are done or it has to be ended; returns the records of those begun."""
    receiver, sender = os.pipe()
    command = [sys.executable, __file__, "--worker", str(sender), "--device", device, "--output", str(output)]
    paths = [str(ROOT / "ssl"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Deterministic products need it before CUDA starts; it costs nothing else.
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cpu":
        # Where there is a GPU, too.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (output / "log.txt").open("ab") as log:
        worker = subprocess.Popen(
            [*command, "--stages", *map(str, todo)],
            pass_fds=[sender],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # With a group of its own, what it has started ends with it.
            start_new_session=True,
        )
    os.close(sender)
    messages: queue.Queue[Record | None] = queue.Queue()
    threading.Thread(target=_receive, args=(receiver, messages), daemon=True).start()
    records: list[Record] = []
    try:
        problem = _follow(messages, records, device, output, commit)
        if not problem:
            # It may still have to say why it ends.
            with suppress(subprocess.TimeoutExpired):
                worker.wait(ENDING)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        status = worker.wait()
    if records and records[-1]["status"] == "begun":
        why = problem or f"the process ended with status {status}, see log.txt"
        records[-1] |= {"status": "cut off", "problem": why}
        _write(output, records[-1])
    return records


def _follow(
    messages: "queue.Queue[Record | None]", records: list[Record], device: str, output: Path, commit: str
) -> str:
    """Writes down what a process sends, until it ends or exceeds a limit; returns which."""
    machine: Record = {}
    begun, limit = time.monotonic(), START
    while True:
        try:
            message = messages.get(timeout=max(0.0, begun + limit - time.monotonic()))
        except queue.Empty:
            if records:
                records[-1]["seconds"] = time.monotonic() - begun
            return f"not done after {limit:g} seconds"
        if message is None:
            return ""
        if "machine" in message:
            machine = message["machine"]
            continue
        if "stage" in message:
            stage = STAGES[message["stage"]]
            begun, limit = time.monotonic(), stage.limit * (1 if device == "cuda" else PATIENCE)
            print(f"{message['stage']} {stage.title} …", flush=True)
            record = {"stage": message["stage"], "name": stage.name, "status": "begun", "problem": "", "rows": []}
            records.append(record | {"device": device, "commit": commit, "machine": machine})
        elif "row" in message:
            records[-1]["rows"].append(message["row"] | {"after": time.monotonic() - begun})
        else:
            records[-1] |= {"status": "failed" if message["problem"] else "done", "problem": message["problem"]}
        records[-1]["seconds"] = time.monotonic() - begun
        _write(output, records[-1])


def _receive(receiver: int, messages: "queue.Queue[Record | None]") -> None:
    with os.fdopen(receiver, encoding="utf-8") as lines:
        for line in lines:
            messages.put(json.loads(line))
    messages.put(None)


def _work(stages: Sequence[int], device: str, output: Path, sender: int) -> None:
    """Does the stages in this process and sends each row as it comes."""
    import torch

    from benchmarks import harness
    from gpu_checks.measure import Setup

    with os.fdopen(sender, "w", encoding="utf-8") as pipe:

        def send(message: Record) -> None:
            pipe.write(json.dumps(message, ensure_ascii=False) + "\n")
            pipe.flush()

        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no GPU is seen: use --device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES")
        send({"machine": harness.components(("accelerate", "timm", "kornia", "torchvision", "triton", "lightly"))})
        # What most stages import is not on their time.
        importlib.import_module("gpu_checks.loops")
        for number in stages:
            folder = output / f"files-{STAGES[number].name}"
            send({"stage": number})
            problem = ""
            try:
                module = importlib.import_module(f"gpu_checks.{STAGES[number].name}")
                for row in module.rows(Setup(torch.device(device), device == "cpu", folder)):
                    send({"row": dataclasses.asdict(row)})
            except Exception as raised:
                traceback.print_exc()
                problem = f"{type(raised).__name__}: {raised}"
            send({"problem": problem})
            if problem:
                # An error on a GPU stays with the process: another one does the other stages.
                return
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _read(output: Path) -> dict[int, Record]:
    files = [output / f"{number}-{stage.name}.json" for number, stage in STAGES.items()]
    records = [json.loads(file.read_text("utf-8")) for file in files if file.exists()]
    return {record["stage"]: record for record in records}


def _write(output: Path, record: Record) -> None:
    """Writes a record by renaming: whoever reads sees a whole file."""
    file = output / f"{record['stage']}-{record['name']}.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new.replace(file)


def _is_done(record: Record | None, device: str, commit: str) -> bool:
    return record is not None and (record["status"], record["device"], record["commit"]) == ("done", device, commit)


def _show(records: Sequence[Record], file: Path) -> None:
    """Prints the table, and writes it as Markdown."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    machine: Record = next((record["machine"] for record in records if record["machine"]), {})
    for key, text in machine.items():
        console.print(f"[dim]{key:>11}[/dim]  {text}", highlight=False)
    heads = ("stage", "what", "value", "goal", "", "note")
    table = Table(*heads)
    text = [f"{key}: {value}  " for key, value in machine.items()]
    text += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for record in records:
        rows = [(row["what"], value_of(row), row["goal"], _verdict(row), row["note"]) for row in record["rows"]]
        if record["status"] != "done":
            rows.append((record["problem"], "", "", record["status"], ""))
        seconds = f"{record['seconds']:.0f} s"
        for index, row in enumerate(rows):
            first = f"{record['stage']} {record['name']}, {seconds}" if index == 0 else ""
            cells = [cell.replace("|", "/").replace("\n", " ") for cell in (first, *row)]
            table.add_row(*(cell.replace("[", r"\[") for cell in cells))
            text.append(f"| {' | '.join(cells)} |")
        table.add_section()
    console.print(table)
    failed = [what for record in records for what in failing(record)]
    total = sum(record["seconds"] for record in records)
    summary = f"{len(failed)} checks fail" + (f": {'; '.join(failed)}" if failed else "") + f". {total:.0f} seconds."
    console.print(summary, highlight=False, markup=False)
    file.write_text("\n".join([*text, "", summary, ""]), "utf-8")


def value_of(row: Record) -> str:
    """Formats the value of a row with its unit."""
    value, unit = row["value"], row["unit"]
    if value is None:
        return "–"
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value} {unit}".strip()


def _verdict(row: Record) -> str:
    if row["holds"] is None:
        return ""
    return ("holds" if row["holds"] else "FAILS") if row["check"] else ("met" if row["holds"] else "missed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
