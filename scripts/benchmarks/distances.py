"""LMNN and MMC on features of Fashion-MNIST, beside metric-learn's: seconds and the accuracy of nearest neighbours."""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from manyviews.data import Sample
from manyviews.engine import squared_distance_rows, top_k
from manyviews.linear_metrics import LMNN, MMC, Mahalanobis, Metric

DIM = 128
SIZES = (1_000, 10_000)
NEIGHBOURS = (1, 3, 5, 7, 10)
PACKAGES = ("metric-learn==0.7.0", "scikit-learn<1.6", "numpy")
"""An environment of its own: metric-learn 0.7 passes `force_all_finite`, which scikit-learn 1.8 no longer takes."""
OURS: dict[str, Metric] = {
    "Mahalanobis": Mahalanobis(),
    "MMC": MMC(),
    "MMC, prior=0 (the paper's)": MMC(prior=0.0),
    "MMC, diagonal": MMC(diagonal=True),
    "LMNN": LMNN(),
}
THEIRS = {
    "metric-learn MMC": "MMC_Supervised(random_state=0, verbose=True)",
    "metric-learn MMC, diagonal": "MMC_Supervised(random_state=0, verbose=True, diagonal=True)",
    "metric-learn LMNN": "LMNN(init='identity', verbose=True)",
}
RIVAL = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from metric_learn import LMNN, MMC_Supervised
features, labels = np.load(sys.argv[1]), np.load(sys.argv[2])
metric, start = eval(sys.argv[3]), time.perf_counter()
metric.fit(features, labels)
print("seconds", time.perf_counter() - start)
np.save(sys.argv[4], metric.components_)
"""
NOTES = (
    f"features: the first {DIM} principal components of the pixels of the package's own sample, 10,000 images.",
    "accuracy: majority of the nearest training images after each map, of 2,000 test images; how many vote is the",
    f"best of {', '.join(map(str, NEIGHBOURS))} by leaving one out of the training images, for every map alike.",
    "metric-learn: its defaults, LMNN from the identity; its MMC takes 2,000 random pairs of each kind, ours all.",
    "times ours: its seconds over those of our metric of that name. Where the limit ended a fit there is no accuracy,",
    "and 'at least' is the limit over our seconds; seconds per step are the limit over the steps that it had printed.",
    "within: mean squared distance within classes where the mean distance between classes is 1: MMC's objective, of",
    "all pairs; prior=0 has the least. moved: how far the metric's matrix is from a multiple of the identity.",
)


class Problem(NamedTuple):
    """Training and test features of some size."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """The sizes, the limit of time, and where metric-learn's environment is."""
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="training images (1,000 and 10,000)"
    )
    parser.add_argument("--limit", type=float, default=240.0, metavar="S", help="seconds for each fit of metric-learn")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path.home() / ".cache" / "manyviews" / "metric-learn",
        metavar="FOLDER",
        help="metric-learn's virtual environment, made there if it is missing (~/.cache/manyviews/metric-learn)",
    )


def run(options: argparse.Namespace) -> harness.Report:
    """Fits each metric once at every size: a fit takes seconds, and metric-learn's minutes to hours."""
    python = environment(options.environment)
    rows: list[dict[str, harness.Value]] = []
    for size in options.sizes:
        problem = features(size)
        rows.append({"metric": "Euclidean", "images": size, **quality(problem, torch.eye(DIM))})
        ours: dict[str, float] = {}
        for name, settings in OURS.items():
            start = time.perf_counter()
            metric = settings.fit(problem.train, problem.labels)
            ours[name] = time.perf_counter() - start
            row = {"metric": name, "images": size, "seconds": ours[name], "steps": metric.figures.get("iterations")}
            rows.append(row | quality(problem, metric.weights))
        for name, expression in THEIRS.items():
            own = ours[name.removeprefix("metric-learn ")]
            rows.append({"metric": name, "images": size, **rival(expression, problem, python, options.limit, own)})
    return harness.Report(
        title=f"Linear metrics on features of Fashion-MNIST, d = {DIM}",
        rows=rows,
        notes=NOTES,
        components=harness.components() | {"rivals": versions(python)},
    )


def environment(folder: Path) -> Path:
    """The Python of metric-learn's virtual environment, which is made where it is missing."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def versions(python: Path) -> str:
    """What is installed in metric-learn's environment."""
    names = [package.split("=")[0].split("<")[0] for package in PACKAGES]
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def features(size: int) -> Problem:
    """The first images of the sample, equally many of each class, and all of its test images."""
    split = Sample().build()
    train, test = (images.read(torch.arange(len(images))).flatten(1) / 255 for images in (split.train, split.test))
    assert split.train.labels is not None
    assert split.test.labels is not None
    centred = train - train.mean(0)
    components = torch.linalg.eigh((centred.T @ centred).double()).eigenvectors[:, -DIM:].float()
    order = split.train.labels.argsort(stable=True).view(10, -1)[:, : size // 10].flatten()
    mapped = [(images - train.mean(0)) @ components for images in (train[order], test)]
    return Problem(mapped[0], split.train.labels[order], mapped[1], split.test.labels)


def quality(problem: Problem, weights: Tensor) -> dict[str, harness.Value]:
    """What a map is worth: the accuracy of nearest neighbours, MMC's objective, and how far it is from the identity."""
    train, test = problem.train @ weights.T, problem.test @ weights.T
    ids = torch.arange(len(train))
    left, right = squared_distance_rows(train, train)
    own = problem.labels[top_k(-left, right, max(NEIGHBOURS), query_ids=ids, key_ids=ids)[1]]
    left, right = squared_distance_rows(test, train)
    found = problem.labels[top_k(-left, right, max(NEIGHBOURS))[1]]
    alone = [float((own[:, :k].mode(1).values == problem.labels).double().mean()) for k in NEIGHBOURS]
    k = NEIGHBOURS[alone.index(max(alone))]
    matrix = (weights.T @ weights).double()
    matrix /= matrix.trace() / DIM
    return {
        "accuracy": float((found[:, :k].mode(1).values == problem.test_labels).double().mean()),
        "neighbours": k,
        "within": within(train, problem.labels),
        "moved": float((matrix - torch.eye(DIM)).norm() / DIM**0.5),
    }


def within(mapped: Tensor, labels: Tensor) -> float:
    """The mean squared distance within classes over the square of the mean distance between classes."""
    squares, lengths, alike = 0.0, 0.0, 0
    for rows in torch.arange(len(mapped)).split(500):
        distances = torch.cdist(mapped[rows], mapped)
        same = labels[rows, None] == labels
        squares += float(distances[same].square().double().sum())
        lengths += float(distances[~same].double().sum())
        alike += int(same.sum())
    # Each image with itself is no pair.
    return squares / (alike - len(mapped)) / (lengths / (len(mapped) ** 2 - alike)) ** 2


def rival(expression: str, problem: Problem, python: Path, limit: float, own: float) -> dict[str, harness.Value]:
    """The row of one of metric-learn's fits, in a process of its own that is ended at the limit."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("features.npy", "labels.npy", "map.npy", "printed")]
        np.save(files[0], problem.train.double().numpy())
        np.save(files[1], problem.labels.numpy())
        words = [str(python), "-u", "-c", RIVAL, str(files[0]), str(files[1]), expression, str(files[2])]
        variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        ended = False
        with files[3].open("w") as printed:
            try:
                subprocess.run(words, check=True, env=variables, stdout=printed, timeout=limit)
            except subprocess.TimeoutExpired:
                ended = True
        lines = files[3].read_text().splitlines()
        steps = sum(bool(re.match(r"mmc iter|\d+ ", line)) for line in lines)
        if ended:
            return {
                "seconds": f"over {limit:g}",
                "steps": steps,
                "seconds per step": limit / max(steps, 1),
                "times ours": f"at least {limit / own:.3g}",
            }
        seconds = float(lines[-1].split()[1])
        row = {"seconds": seconds, "steps": steps, "seconds per step": seconds / max(steps, 1)}
        weights = torch.from_numpy(np.load(files[2])).float()
        return row | {"times ours": seconds / own} | quality(problem, weights)
