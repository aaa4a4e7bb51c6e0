"""The table of Wu et al. 2017, "Sampling matters": samplers of negatives beside losses, at equal time."""

import argparse
from collections.abc import Mapping

from benchmarks import harness
from benchmarks.objectives import LAYERS, Case, add_options, baselines, notes, row, train_and_measure

SAMPLERS = {"random": "random", "semi-hard": "semi_hard", "distance-weighted": "distance_weighted"}
LOSSES: Mapping[str, tuple[str, ...]] = {
    "contrastive": ("siamese",),
    "triplet, squared distances": ("facenet",),
    "triplet, plain distances": ("facenet", "objective.squared=false"),
    "margin": ("margin_distance_weighted",),
}
PUBLISHED = {
    ("random", "contrastive"): 30.1,
    ("random", "margin"): 37.5,
    ("semi-hard", "contrastive"): 49.4,
    ("semi-hard", "triplet, squared distances"): 49.7,
    ("semi-hard", "triplet, plain distances"): 47.4,
    ("semi-hard", "margin"): 61.0,
    ("distance-weighted", "contrastive"): 39.2,
    ("distance-weighted", "triplet, squared distances"): 53.4,
    ("distance-weighted", "triplet, plain distances"): 54.5,
    ("distance-weighted", "margin"): 61.7,
}
"""Recall@1 on Stanford Online Products, as it is quoted."""

__all__ = ["add_options", "run"]


def run(options: argparse.Namespace) -> harness.Report:
    """Trains and measures every pair of a sampler and a loss, all with the same batches of classes."""
    cases = {
        f"{sampler}, {loss}": Case("labels", (*words, f"objective.sampling.name={name}"))
        for loss, words in LOSSES.items()
        for sampler, name in SAMPLERS.items()
    }
    chosen = {name: case for name, case in cases.items() if not options.only or name.startswith(tuple(options.only))}
    measured = train_and_measure(chosen, options)
    rows: list[dict[str, harness.Value]] = []
    for (sampler, loss), name in {(s, loss): f"{s}, {loss}" for loss in LOSSES for s in SAMPLERS}.items():
        if name in measured:
            published = PUBLISHED.get((sampler, loss))
            rows.append(
                {"sampling": sampler, "objective": loss, **row(measured[name], *LAYERS), "published": published}
            )
    return harness.Report(
        title="Sampling matters: negatives for pairs and triplets",
        rows=rows + baselines(measured, {"sampling": "–"}),
        notes=(*notes(options), "Published: Recall@1 on Stanford Online Products (Wu et al. 2017, as quoted)."),
        packages=("timm",),
    )
