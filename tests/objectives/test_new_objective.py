"""The objective that docs/add_objective.md adds, in a copy of the package: trained, costed, listed and tested."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_objective.md").read_text()
TRAIN = [
    "train.batch_size=32",
    "train.epochs=0.0064",
    "train.precision=fp32",
    "train.preview=0",
    "train.monitor=0",
    "train.threads=1",
    "train.log_every=1",
]


def code(mark: str) -> str:
    """The block of Python after a mark."""
    return PAGE.split(f"<!-- {mark} -->\n```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source root with the package as the page changes it: a file more, and a word in the union."""
    root = tmp_path_factory.mktemp("checkout") / "ssl"
    shutil.copytree(ROOT / "ssl", root, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", root.parent / "configs")
    objectives = root / "manyviews" / "objectives"
    (objectives / "uniformity.py").write_text(code("file"))
    union = objectives / "__init__.py"
    word = re.search(r"^\+( +\| \w+)$", PAGE, re.MULTILINE)
    assert word
    text = union.read_text().replace("    InBatch\n", f"    InBatch\n{word[1]}\n")
    union.write_text(text.replace("\nObjective = ", f"{code('word')}\nObjective = "))
    return root


def run(source: Path, *words: str) -> str:
    """The output of Python with the changed package."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run that was trained by it, its output, and the help, by one process."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train = ["quickstart", "objective=uniformity", *TRAIN, f"output={folder}"]
    program = f"from manyviews import cli; assert cli.pretrain({train}) == 0; cli.pretrain(['--help'])"
    output, mark, help_text = run(source, "-c", program).partition("usage: ")
    assert mark
    return folder, output, help_text


def test_it_is_trained_by_and_its_cost_is_logged(trained: tuple[Path, str, str]) -> None:
    folder, output, _ = trained
    assert "objective  uniformity; it bounds no information" in output
    assert "negatives  62 per anchor" in output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines
    assert all({"loss", "uniformity", "positive_similarity"} <= line.keys() for line in lines)
    assert (folder / "done").exists()


def test_help_lists_it_with_its_keys(trained: tuple[Path, str, str]) -> None:
    _, _, help_text = trained
    assert "uniformity" in help_text
    assert "objective.sharpness" in help_text
    assert "Of the uniformity, beside the alignment." in help_text


@pytest.mark.slow
def test_it_enters_the_tests_of_all_objectives_by_itself(source: Path) -> None:
    tests = [f"tests/objectives/{name}.py" for name in ("test_contract", "test_cost")]
    said = run(source, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "uniformity")
    passed = re.findall(r"(\d+) passed", said)
    assert int(passed[0]) >= 13


def test_its_mathematics_is_that_of_a_loop(source: Path) -> None:
    spec = spec_from_file_location("uniformity", source / "manyviews" / "objectives" / "uniformity.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    z = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = [7, 2, 7, 5]
    points = torch.nn.functional.normalize(z, dim=2)
    losses = []
    for view in range(3):
        for image in range(4):
            x = points[view, image]
            near = [(x - points[other, image]).square().sum() for other in range(3) if other != view]
            far = [(x - points[v, i]).square().sum() for v in range(3) for i in range(4) if ids[i] != ids[image]]
            uniformity = torch.stack(far).mul(-1.5).exp().mean().log()
            losses.append(torch.stack(near).mean() + 0.5 * uniformity)
    found = module.alignment_and_uniformity(z, torch.tensor(ids), 0.5, 1.5)
    torch.testing.assert_close(found.total, torch.stack(losses).mean(), rtol=1e-12, atol=1e-12)
