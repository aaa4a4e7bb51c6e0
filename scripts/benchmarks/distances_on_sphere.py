"""Distances of random points on the sphere, or of embeddings, beside their density: Wu et al. 2017, figure 2."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import betaincinv, gammaincc
from torch import Tensor

from benchmarks import harness
from manyviews.engine import normalize
from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.drawing import FAINT, FIRST, INK, SECOND, THIRD, new_axes
from manyviews.features.backbone import open_run
from manyviews.features.encoding import extract
from manyviews.features.layers import OneLayer, layers_of
from manyviews.objectives.mining import density

DIMS = (4, 8, 16, 32, 64, 128)
PAIRS, SEED = 50_000, 0
CELLS = 50
"""Bins of the χ² test, of equal probability."""
BARS = 120
LEAST = 1e-6
"""p-value below which random points contradict q(d): by chance in one of a million tests."""
IMAGES, DPI = 4_000, 110
COLOURS = (FIRST, SECOND, THIRD, "#8f6fc0", "#b5a22e", "#e15759")
NOTES = (
    "q(d) = (d/2)^(n-2) (1 - d²/4)^((n-3)/2) / B((n-1)/2, (n-1)/2): d²/4 has the distribution Beta((n-1)/2, (n-1)/2).",
    f"χ²: Pearson's, of {CELLS} bins of equal probability under q(d), with {CELLS - 1} degrees of freedom. No point is",
    "in two pairs, so that the distances are independent.",
)


class Fit(NamedTuple):
    """Pearson's test of distances against q(d)."""

    statistic: float
    p: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The dimensions or a run, and the picture."""
    dims = ", ".join(map(str, DIMS))
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="N", help=f"dimensions ({dims})")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"random pairs of each ({PAIRS:,})")
    parser.add_argument("--run", type=Path, metavar="RUN", help="the embeddings of a run in place of random ones")
    picture = Path("distances_on_sphere.png")
    parser.add_argument("--picture", type=Path, default=picture, metavar="FILE", help=f"the PNG ({picture})")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures, tests and draws; random points that contradict q(d) are an error."""
    if options.picture.suffix.lower() != ".png":
        raise SystemExit(f"--picture {options.picture}: its name must end with .png")
    if wrong := [dim for dim in options.dims if dim < 2]:
        raise SystemExit(f"--dims {wrong[0]} must be at least 2")
    if options.pairs < 10 * CELLS:
        raise SystemExit(f"--pairs {options.pairs} must be at least {10 * CELLS}: ten for each bin of the test")
    if options.run is None:
        measured = {f"random, n = {dim}": (dim, random_distances(dim, options.pairs)) for dim in options.dims}
        title = "Distances of points that are uniform on the unit sphere"
    else:
        rows = run_embeddings(options.run)
        measured = {f"embeddings of {options.run.name}": (rows.shape[1], paired_distances(rows))}
        title = f"Distances of {len(rows):,} embeddings of {options.run}"
    rows_of_table: list[dict[str, harness.Value]] = []
    for name, (dim, distances) in measured.items():
        fit = fit_of(distances, dim)
        row: dict[str, harness.Value] = {"points": name, "pairs": len(distances)}
        row |= {"mean": float(distances.mean()), "mean of q(d)": mean_distance(dim), "χ²": fit.statistic, "p": fit.p}
        rows_of_table.append(row)
        if options.run is None and fit.p < LEAST:
            raise RuntimeError(
                f"{name}: χ² = {fit.statistic:.1f}, p = {fit.p:.1e}: the distances are not those of q(d)"
            )
    pixels = as_pixels(figure_of(measured), DPI)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).quantize(64).save(options.picture, optimize=True)
    return harness.Report(title=title, rows=rows_of_table, notes=(*NOTES, f"drawn in {options.picture}"))


def random_distances(dim: int, pairs: int, seed: int = SEED) -> Float[np.ndarray, " pairs"]:
    """Distances of independent pairs of uniform points."""
    generator = torch.Generator().manual_seed(seed + dim)
    return paired_distances(torch.randn(2 * pairs, dim, generator=generator, dtype=torch.float64))


def paired_distances(rows: Float[Tensor, "points dim"]) -> Float[np.ndarray, " pairs"]:
    """Distances of the directions of each two rows of the first and the second half."""
    half = len(rows) // 2
    first, second = normalize(rows[:half]), normalize(rows[half : 2 * half])
    distances: np.ndarray = (first - second).norm(dim=1).double().numpy()
    return distances


def fit_of(distances: Float[np.ndarray, " pairs"], dim: int) -> Fit:
    """Tests distances against q(d) by Pearson's χ² in bins of equal probability."""
    shape = (dim - 1) / 2
    edges = 2 * np.sqrt(betaincinv(shape, shape, np.linspace(0, 1, CELLS + 1)[1:-1]))
    counted: Int[np.ndarray, " cells"] = np.bincount(np.searchsorted(edges, distances), minlength=CELLS)
    expected = len(distances) / CELLS
    statistic = float(((counted - expected) ** 2).sum() / expected)
    return Fit(statistic, float(gammaincc((CELLS - 1) / 2, statistic / 2)))


def mean_distance(dim: int) -> float:
    """The mean of q(d)."""
    # E 2√x of Beta(a, a): 2 Γ(a + 1/2) Γ(2a) / (Γ(a) Γ(2a + 1/2)).
    a = (dim - 1) / 2
    return 2 * math.exp(math.lgamma(a + 0.5) + math.lgamma(2 * a) - math.lgamma(a) - math.lgamma(2 * a + 0.5))


def run_embeddings(folder: Path) -> Float[Tensor, "images dim"]:
    """Embeddings of some of a run's training images, in random order."""
    opened = open_run(folder)
    assert opened.recipe is not None
    images = opened.recipe.data.build(workers=0, report=None).train
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randperm(len(images), generator=generator)[:IMAGES]
    layers, _ = layers_of(opened, ("embedding",))
    return extract(OneLayer(layers), images, view=opened.view, ids=ids)


def figure_of(measured: Mapping[str, tuple[int, np.ndarray]]) -> Figure:
    """Draws histograms and the densities over them."""
    figure, axes = new_axes(6.2, 3.2)
    grid = np.linspace(0, 2, 801)[1:-1]
    for (name, (dim, distances)), colour in zip(measured.items(), COLOURS * len(measured), strict=False):
        bars = BARS if len(distances) >= PAIRS else BARS // 2
        heights, edges = np.histogram(distances, np.linspace(0, 2, bars + 1), density=True)
        axes.stairs(heights, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(heights, edges, color=colour, linewidth=0.6, label=name)
        alone = len(measured) == 1
        line, label = (INK, f"q(d), n = {dim}") if alone else (colour, None)
        axes.plot(grid, density(torch.from_numpy(grid), dim).numpy(), color=line, linewidth=1.3, label=label)
    axes.axvline(math.sqrt(2), color=FAINT, linewidth=1, linestyle=":")
    axes.set_xlim(0, 2)
    axes.set_ylim(0, None)
    axes.set_xlabel("distance of two points; the smooth lines are q(d)", color=INK, fontsize=9)
    axes.set_ylabel("density", color=INK, fontsize=9)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    return figure
