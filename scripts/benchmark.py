"""Measures this project beside its rivals: `python scripts/benchmark.py NAME [--json FILE] [--repetitions N]`.

Each NAME is a file in scripts/benchmarks/. The rivals come with `pip install 'manyviews[benchmark]'`.
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import harness

FOLDER = Path(__file__).parent / "benchmarks"


def main(words: list[str]) -> None:
    """Runs one benchmark, prints its table, and writes the same figures as JSON where asked."""
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in {"harness", "__init__"})
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description="Measures this project beside its rivals.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name in names:
        # Only the benchmark that was asked for is imported: the others may need what is not installed.
        module = importlib.import_module(f"benchmarks.{name}") if name in words else None
        command = commands.add_parser(name, help=harness.first_line(FOLDER / f"{name}.py"), allow_abbrev=False)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
        command.add_argument("--repetitions", type=int, default=5, metavar="N", help="timed runs of each case (5)")
        if module is not None and hasattr(module, "add_options"):
            module.add_options(command)
    options = parser.parse_args(words)
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions} must be at least 1")
    report: harness.Report = importlib.import_module(f"benchmarks.{options.name}").run(options)
    harness.show(report)
    if options.json is not None:
        harness.write_json(report, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
