"""A run is evaluated on one and on several GPUs, pretend ones: the scores of the CPU."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manyviews import cli
from pretend_cuda import pretend_cuda
from processes import launched
from recorded import recorded
from small_run import photographs, small_run

FEW = ["few.draws=2", "few.shares=[]", "few.shots=[2]", "few.regularisations=[0.1]", "report=false", "batch_size=16"]
PROTOCOL = ["protocol.knn.neighbours=[1, 5]", "protocol.linear.regularisations=[0.1, 1]"]
PAIRS = ["protocol.verification.pairs=40", "protocol.verification.folds=2", "protocol.augmented.epochs=2"]
TASKS = "tasks=knn,linear,augmented,retrieval,clustering,verification,geometry,fractions"
METRIC = "metric=mahalanobis"
COUNTS = [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    small_run(folder / "run", f"data={photographs(folder / 'photographs', 30)}", "data.size=28", "data.channels=1")
    return folder / "run"


def on_gpus(command: str, args: list[str], log: str, count: int) -> int:
    """Calls a command on a pretend GPU, and writes what its collectives carried."""
    with pretend_cuda(count) as seen:
        code: int = getattr(cli, command)(args)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            waits = {line: number for line, number in seen.waits.items() if "evaluators/" in line}
            Path(log).write_text(json.dumps({"collectives": seen.collectives, "waits": waits}))
        return code


@pytest.fixture(scope="module")
def measured_by_the_cpu(run: Path) -> Path:
    folder = shutil.copytree(run, run.parent / "cpu")
    launched(cli.evaluate, [str(folder), *FEW, *PROTOCOL, *PAIRS, TASKS, METRIC], count=1)
    return folder


@pytest.mark.parametrize("count", COUNTS)
def test_gpus_measure_what_the_cpu_measures(count: int, run: Path, measured_by_the_cpu: Path, tmp_path: Path) -> None:
    folders = measured_by_the_cpu, shutil.copytree(run, tmp_path / "gpu")
    args = [str(folders[1]), *FEW, *PROTOCOL, *PAIRS, TASKS, METRIC]
    launched(on_gpus, "evaluate", args, str(tmp_path / "log"), count, count=count)
    expected, found = (recorded(folder)["measurements"] for folder in folders)
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        assert {key: own[key] for key in ("task", "features", "metric", "n")} == {
            key: other[key] for key in ("task", "features", "metric", "n")
        }
        # Features differ by rounding: TF32 is not pretended, sums have another order.
        assert own["value"] == pytest.approx(other["value"], rel=2e-3, abs=2e-3), own
    outcomes = [load_file(folder / "outcomes.safetensors") for folder in folders]
    assert outcomes[0].keys() == outcomes[1].keys()
    log = json.loads((tmp_path / "log").read_text())
    if count > 1:
        assert any(name.startswith("nccl") for name in log["collectives"])
        assert any(name.startswith("gloo") for name in log["collectives"])
    else:
        assert not log["collectives"]


@pytest.mark.parametrize("count", COUNTS)
def test_gpus_extract_what_the_cpu_extracts(count: int, run: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("cpu", "gpu")]
    args = [str(run), "batch_size=16", "layers=backbone,projector"]
    launched(cli.extract, [*args, f"output={outputs[0]}"], count=1)
    launched(on_gpus, "extract", [*args, f"output={outputs[1]}"], str(tmp_path / "log"), count, count=count)
    for name in ("backbone", "projector", "labels"):
        cpu, gpu = (np.load(output / f"{name}.npy") for output in outputs)
        np.testing.assert_allclose(gpu, cpu, rtol=1e-4, atol=1e-5)
