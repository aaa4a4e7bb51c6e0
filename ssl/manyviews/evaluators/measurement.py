"""Figures of retrieval, clustering and verification, with their intervals, as a record and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool
from rich import box
from rich.table import Table
from torch import Tensor

from manyviews.evaluators.clustering import ClusteringResult
from manyviews.evaluators.intervals import mean_interval, wilson
from manyviews.evaluators.kinds import label
from manyviews.evaluators.retrieval import RetrievalResult, RetrievalSettings
from manyviews.evaluators.verification import VerificationResult
from manyviews.features.layers import EMBEDDING

Grouping = Literal["retrieval", "clustering", "verification"]
LEADING: Mapping[Grouping, str] = {"retrieval": "Recall@1", "clustering": "AMI", "verification": "accuracy"}
"""The figure by which features are compared with their baselines, where it has an interval."""


@dataclass(frozen=True)
class Figures:
    """What one kind of features scores in one task, on test images compared with each other; shares from 0 to 1."""

    features: str
    task: Grouping
    dim: int
    counts: Mapping[str, int]
    """How much was compared: queries and those left out, images, or pairs."""
    values: Mapping[str, float]
    """By the figure's usual name: Recall@1, R-precision, MAP@R, NDCG@10; NMI, AMI; accuracy, AUC, TAR@FAR=0.01."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The 95 % intervals of figures that are proportions or means of queries, over draws of the queries."""
    deviations: Mapping[str, float] = field(default_factory=dict)
    """The standard deviations of figures that are means of folds."""
    layer: str | None = None
    """Of the encoder: backbone or embedding; None for raw pixels."""
    metric: str = "cosine"
    """The distance by which the images were compared."""


def of_retrieval(kind: str, dim: int, result: RetrievalResult, settings: RetrievalSettings) -> Figures:
    """The means over the queries."""
    recalls: dict[str, Bool[Tensor, " counted"]] = {
        f"Recall@{k}": found for k, found in zip(settings.recall_at, result.recall, strict=True)
    }
    means = {"R-precision": result.r_precision, "MAP@R": result.map_at_r}
    means |= {f"NDCG@{k}": found for k, found in zip(settings.ndcg_at, result.ndcg, strict=True)}
    total = len(result.queries)
    return Figures(
        kind,
        "retrieval",
        dim,
        {"queries": total, "left_out": result.left_out},
        {name: found.double().mean().item() for name, found in (recalls | means).items()},
        {name: wilson(int(found.sum()), total) for name, found in recalls.items()}
        | {name: mean_interval(found) for name, found in means.items()},
    )


def of_clustering(kind: str, dim: int, result: ClusteringResult, images: int) -> Figures:
    """The two figures, of one clustering of all images: no interval belongs to them."""
    return Figures(kind, "clustering", dim, {"images": images}, {"NMI": result.nmi, "AMI": result.ami})


def of_verification(kind: str, dim: int, result: VerificationResult) -> Figures:
    """The means over the folds."""
    accepts = {f"TAR@FAR={rate:g}": found for rate, found in result.true_accepts.items()}
    return Figures(
        kind,
        "verification",
        dim,
        {"pairs": len(result.correct)},
        {"accuracy": result.accuracy, "AUC": result.auc} | {name: found.mean for name, found in accepts.items()},
        deviations={"accuracy": result.deviation} | {name: found.deviation for name, found in accepts.items()},
    )


def distances(figures: Sequence[Figures]) -> str:
    """By which distance images were compared; that of the embedding is named where it is another."""
    first, *others = dict.fromkeys(own.metric for own in sorted(figures, key=lambda own: own.layer == EMBEDDING))
    return first + "".join(f", the embedding by {other}" for other in others)


def table(title: str, figures: Sequence[Figures]) -> Table:
    """A row for each kind of features: its figures in per cent, the leading one with its interval."""
    first = figures[0]
    shown = Table("features", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in first.values:
        shown.add_column(name.replace("Recall@", "R@").replace("R-precision", "R-prec."), justify="right", no_wrap=True)
        if name == LEADING[first.task] and name in first.intervals:
            shown.add_column("95 %", no_wrap=True)
    for own in figures:
        cells = [label(own.features)]
        for name, value in own.values.items():
            deviation = f" ± {100 * own.deviations[name]:.1f}" if name in own.deviations else ""
            cells.append(f"{100 * value:.1f}{deviation}")
            if name == LEADING[own.task] and name in own.intervals:
                low, high = own.intervals[name]
                cells.append(f"{100 * low:.1f}–{100 * high:.1f}")
        shown.add_row(*cells, style="bold" if own is first else None)
    return shown
