"""The Python in README and docs/ runs, page by page, with short budgets."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import manyviews
from manyviews.linear_metrics import LinearMetric
from pages import ROOT, blocks

SHORT: dict[str, Any] = {"epochs": 0.0064, "threads": 1, "monitor": 0, "preview": 0, "batch_size": 32}
PAGES = ["README.md", "docs/evaluation.md", "docs/features.md", "docs/finetuning.md", "docs/python.md"]
ELSEWHERE = {"docs/add_objective.md": "test_new_objective.py and test_interface.py"}
"""Pages whose blocks other tests run."""


def shortened(code: str) -> str:
    """The code with a training of a few steps, and of a few labels, and without the evaluation of baselines."""
    code = re.sub(r'train=\{"epochs".*?\}', "train=SHORT", code)
    code = re.sub(r"(pretrain\([^)]*?)(, on_metrics|\)\n)", r"\1, train=SHORT\2", code) if "SHORT" not in code else code
    code = code.replace(".evaluate(", ".evaluate(baselines=False, ")
    return code.replace("fraction=0.1", "fraction=0.5, epochs=1, min_steps=1, warmup_steps=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with images, a run and a metric, as the pages assume."""
    root = tmp_path_factory.mktemp("work")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"photos/{name}/{number}.png")
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(root / name)
    manyviews.pretrain(output=root / "runs/quickstart", train=SHORT)
    (root / "runs/faces/metrics/lmnn").mkdir(parents=True)
    metric = LinearMetric(torch.eye(1152), torch.zeros(1152), {}, {})
    metric.save(root / "runs/faces/metrics/lmnn/learned.safetensors")
    return root


def test_each_page_with_python_is_run_here_or_elsewhere() -> None:
    with_python = {
        str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] if blocks("python", path)
    }
    assert with_python == {*PAGES, *ELSEWHERE}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(folder / "runs") if "python" not in page else None
    for name in ("photos", "a.jpg", "b.jpg"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=lambda values, step: None))
    pixels = torch.zeros(2, 1, 28, 28)
    names: dict[str, Any] = {
        "SHORT": SHORT,
        "images": pixels,
        "features": torch.zeros(2, 1152),
        "file": folder / "a.jpg",
    }
    names |= {"pictures": np.zeros((4, 28, 28), np.uint8), "labels": [0, 1, 0, 1], "wandb": sys.modules["wandb"]}
    # As a program: what registers a model looks its module up.
    program = ModuleType("page")
    vars(program).update(names)
    monkeypatch.setitem(sys.modules, "page", program)
    for block in blocks("python", ROOT / page):
        if "onnx" in block:
            pytest.importorskip("onnxscript")
        exec(shortened(block).replace("/my/images", "photos"), vars(program))
