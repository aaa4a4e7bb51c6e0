"""The script that checks a GPU: in small on the CPU, its stages for a GPU on a pretend one, and on a real one if asked.

`CUDA_VISIBLE_DEVICES` need not be set for `pytest -m gpu`.
"""

import json
import re
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pretend_cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import gpu_check
from gpu_checks import engine, equality, evaluation, evaluators, launches, training, views, waits
from gpu_checks.measure import Row, Setup, attempted, error

ROOT = Path(__file__).parents[1]


def records(folder: Path) -> dict[int, dict[str, Any]]:
    """What the stages wrote, by number."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return {record["stage"]: record for record in found}


def test_all_stages_run_in_small_on_a_cpu_and_are_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = gpu_check.main(["--device", "cpu", "--output", str(tmp_path)])
    found = records(tmp_path)
    assert status == 0, [(record["problem"], gpu_check.failing(record)) for record in found.values()]
    assert found.keys() == gpu_check.STAGES.keys()
    assert all(record["status"] == "done" and record["rows"] for record in found.values())
    assert "torch" in found[1]["machine"]["versions"]
    shown = capsys.readouterr().out
    assert "0 checks fail" in shown
    table = (tmp_path / "table.md").read_text()
    for record in found.values():
        assert all(row["what"].replace("|", "/") in table for row in record["rows"])
    # Every objective of every recipe, and the whole path from the encoder alone to files.
    assert {row["what"] for row in found[2]["rows"]} >= {f"objective: {name}" for name in equality.VARIANTS}
    assert [row["what"].partition(": ")[2] for row in found[5]["rows"]][-1] == "whole run from JPEG"
    monkeypatch.setattr(gpu_check, "_run", lambda *_: pytest.fail("a stage that is done was repeated"))
    assert gpu_check.main(["--device", "cpu", "--output", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_stage_beyond_its_limit_is_cut_off_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = gpu_check.STAGES
    monkeypatch.setattr(gpu_check, "STAGES", stages | {6: stages[6]._replace(limit=0.0)})
    assert gpu_check.main(["--device", "cpu", "--stages", "6", "8", "--output", str(tmp_path)]) == 1
    found = records(tmp_path)
    assert found[6]["status"] == "cut off"
    assert found[6]["problem"] == "not done after 0 seconds"
    assert found[8]["status"] == "done"
    # Only what is not done is run again.
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert gpu_check.main(["--device", "cpu", "--stages", "6", "8", "--output", str(tmp_path)]) == 0
    assert records(tmp_path)[8] == found[8]


def test_without_a_gpu_the_script_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--stages", "1", "--output", str(tmp_path)]) == 1
    assert "no GPU is seen: use --device cpu" in capsys.readouterr().err
    assert not records(tmp_path)


def test_a_part_that_fails_is_a_check_that_fails_and_the_others_go_on() -> None:
    def broken() -> Any:
        yield Row("first", 1.0)
        raise RuntimeError("two\nlines")

    first, last = attempted("part", broken)
    assert first.what == "first"
    assert (last.what, last.holds, last.check, last.note) == ("part", False, True, "RuntimeError: two lines")


def test_an_error_is_relative_and_infinite_where_one_result_alone_is_not_finite() -> None:
    one = torch.tensor([3.0, 4.0, torch.nan])
    assert error(one, one) == 0
    assert error(one + torch.tensor([0.0, 0.05, 0.0]), one) == pytest.approx(0.01, rel=1e-4)
    assert error(torch.tensor([3.0, torch.nan, torch.nan]), one) == torch.inf


class Profile:
    """A profiler that has seen 30 kernels of a millisecond."""

    def __init__(self, **_: Any) -> None:
        self.on = False

    def start(self) -> None:
        self.on = True

    def stop(self) -> None:
        assert self.on

    def key_averages(self) -> list[Any]:
        return [
            types.SimpleNamespace(self_device_time_total=3e4, count=30, device_type=types.SimpleNamespace(name="CUDA"))
        ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pretend GPU whose waits are warnings, as torch gives them."""
    mode = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda name: mode.__setitem__(0, name))
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    wait = pretend_cuda.Log.wait

    def warn(log: pretend_cuda.Log, reason: str, since: int | None = None) -> None:
        wait(log, reason, since)
        # Of explicit waits torch does not warn; the stage itself does.
        if mode[0] == "warn" and "synchronize" not in reason:
            warnings.warn(f"called a {waits.SIGN}", stacklevel=2)

    monkeypatch.setattr(pretend_cuda.Log, "wait", warn)
    # Autocast of the pretend GPU stays in float32, which a scale of 2⁴⁰ does not leave.
    monkeypatch.setattr(launches, "OVERFLOW", float("inf"))
    # Workers would pin memory.
    monkeypatch.setattr(training, "SMALL", tuple(case._replace(files=False) for case in training.SMALL))
    with pretend_cuda.pretend_cuda() as log:
        yield log


def test_everything_agrees_on_the_pretend_gpu(gpu: Any, tmp_path: Path) -> None:
    setup = Setup(torch.device("cuda"), True, tmp_path)
    parts = (equality.objectives, equality.engine, equality.views, evaluators.rows, launches.rows)
    rows = [row for part in parts for row in part(setup)]
    assert gpu.launches.total() > 1000
    assert not [(row.what, row.value, row.note) for row in rows if row.holds is False]
    names = {row.what for row in rows}
    assert {"collectives of bfloat16 on cuda", "fp16: a step that overflows is left out"} <= names


def test_waits_are_counted_by_place_in_steps_that_write_a_line(gpu: Any, tmp_path: Path) -> None:
    waited, launched = waits.rows(Setup(torch.device("cuda"), True, tmp_path))
    assert isinstance(waited.value, int)
    assert waited.holds == (waited.value <= waits.MOST)
    assert sum(int(times or 1) for times in re.findall(r"\.py:\d+(?: ×(\d+))?", waited.note)) == waited.value
    assert launched.value == 30 // waits.PROFILED


def test_stages_that_measure_run_on_the_pretend_gpu(gpu: Any, tmp_path: Path) -> None:
    setup = Setup(torch.device("cuda"), True, tmp_path)
    rows = [row for module in (engine, training, views, evaluation) for row in module.rows(setup)]
    assert not [(row.what, row.note) for row in rows if row.check and row.holds is False]
    assert [row for row in rows if "GPU busy" in row.note]
    assert next(row for row in rows if "memory" in row.what).unit == "GiB"


def test_the_wheels_are_all_that_the_package_needs_beyond_the_bare_machine() -> None:
    script = (ROOT / "scripts" / "gpu_wheels.sh").read_text()
    header = script.partition("set -euo")[0]
    there = {"torch", "torchvision", "timm", "accelerate", "scikit-learn", "matplotlib", "tensorboard"}
    assert all(name in header for name in there)
    # What these depend on.
    there |= {"safetensors", "scipy", "jinja2", "markupsafe", "huggingface_hub", "numpy", "pillow"}
    fetched = set(" ".join(re.findall(r"^fetch (.*)$", script, re.MULTILINE)).split())
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[><=]", name)[0] for name in needed} <= there | fetched
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "gpu_wheels.sh")], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("stage", gpu_check.STAGES)
def test_no_check_of_a_stage_fails_on_a_gpu(stage: int, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is seen")
    gpu_check.main(["--stages", str(stage), "--output", str(tmp_path)])
    (record,) = records(tmp_path).values()
    assert record["status"] == "done", record["problem"]
    assert gpu_check.failing(record) == []
