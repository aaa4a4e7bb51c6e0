"""Training by relations alone beside the untrained encoder: pairs, triplets and ranked lists not seen."""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from benchmarks import harness
from manyviews.data import Images, Sample
from manyviews.features.backbone import open_run
from manyviews.features.encoding import extract
from manyviews.features.layers import EMBEDDING, Layers, OneLayer

KINDS = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)
"""Tops, trousers, shoes and bags, of Fashion-MNIST's ten classes."""
SEEN, ITEMS = 300, 8
"""Relations in a file, and items of a ranked list."""
UNSEEN = 4_000
"""Relations of held-out images that are judged."""
VIEWS = ("views.num_views=1", "views.crop_scale=[0.6,1.0]", "views.brightness=0", "views.contrast=0", "views.blur=0")


class Case(NamedTuple):
    """A kind of relations and what is trained by them."""

    kind: str
    words: tuple[str, ...]


CASES: Mapping[str, Case] = {
    "contrastive": Case("pairs", ("objective=contrastive",)),
    "triplet": Case("triplets", ("objective=triplet",)),
    "ranking: RankNet": Case("ranked", ("objective=ranking", "objective.loss=rank_net")),
    "ranking: ListNet": Case("ranked", ("objective=ranking", "objective.loss=list_net")),
}
BATCHES = {"pairs": 60, "triplets": 60, "ranked": 63}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and for how long."""
    parser.add_argument("--images", type=int, default=24_000, help="images passed in training, for each run (24,000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective (3)")
    parser.add_argument("--only", nargs="+", default=[], help="objectives whose line begins so (all)")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those already there are not run again")


def run(options: argparse.Namespace) -> harness.Report:
    """Trains by files of relations, and judges relations of images that were held out."""
    chosen = {name: case for name, case in CASES.items() if not options.only or name.startswith(tuple(options.only))}
    rows: list[dict[str, harness.Value]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for name, case in chosen.items():
            shares = [judged(name, case, seed, options.images, folder) for seed in range(options.seeds)]
            rows.append(row(name, case, torch.tensor(shares)))
    return harness.Report(
        title="Training by relations alone, judged by relations of held-out images",
        rows=rows,
        notes=(
            f"{SEEN} pairs, triplets or queries with {ITEMS} items, nothing else; {options.images:,} images passed.",
            "Rule: an image of the same class is more relevant than one of the same kind, and that than any other.",
            f"In %, of {UNSEEN:,} relations of held-out images: those whose more relevant image is nearer.",
            "Each seed has its own relations, weights and order; untrained: the same backbone before its first step.",
        ),
        packages=("timm",),
    )


def row(name: str, case: Case, shares: Float[Tensor, "seeds 3"]) -> dict[str, harness.Value]:
    """A line of the table, from the shares of each seed: embedding, backbone, untrained backbone."""
    percent = 100 * shares.double()
    columns = zip(("embedding", "backbone", "untrained"), percent.T.tolist(), strict=True)
    figures: dict[str, harness.Value] = {column: harness.Spread.of(values) for column, values in columns}
    lead = percent[:, 0] - percent[:, 2]
    # The paired interval by Student's t.
    reach = float(stats.t.ppf(0.975, len(lead) - 1) * lead.std() / len(lead) ** 0.5) if len(lead) > 1 else float("inf")
    return {
        "relations": case.kind,
        "objective": name,
        **figures,
        "lead": round(float(lead.mean()), 2),
        "±": round(reach, 2) if len(lead) > 1 else None,
    }


def judged(name: str, case: Case, seed: int, images: int, folder: Path) -> tuple[float, float, float]:
    """Shares of unseen relations that a run gets right: by its embedding, its backbone, and that untrained."""
    split = Sample().build()
    assert split.test is not None
    run_folder = folder / harness.file_name(f"{name} {seed}")
    if not (run_folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{case.kind}-{seed}.csv"
        write(file, case.kind, split.train, np.random.default_rng(seed))
        words = [f"data.relations={file}", *VIEWS, *case.words, f"train.batch_size={BATCHES[case.kind]}"]
        length = {"pairs": 2, "triplets": 3, "ranked": 1 + ITEMS}[case.kind] * SEEN
        words += [f"train.epochs={images / length}", "train.precision=fp32", "train.monitor=0", "train.preview=0"]
        harness.commands(2, ["pretrain", "quickstart", *words, f"seed={seed}", f"output={run_folder}"])
    opened = open_run(run_folder)
    backbone, untrained = opened.backbone(), opened.untrained()
    embedding = OneLayer(Layers(backbone, [EMBEDDING], {EMBEDDING: opened.head(EMBEDDING).module}))
    unseen = drawn(case.kind, split.test, UNSEEN, np.random.default_rng(1000 + seed))
    held_out, view = split.test, opened.view
    shares = [
        right(case.kind, extract(module, held_out, view=view), unseen) for module in (embedding, backbone, untrained)
    ]
    return shares[0], shares[1], shares[2]


class Relations(NamedTuple):
    """Relations as rows of indices of images, the first the query, and the relevance of the others to it."""

    rows: Int[np.ndarray, "relations images"]
    relevances: Int[np.ndarray, "relations items"]


def drawn(kind: str, images: Images, count: int, generator: np.random.Generator) -> Relations:
    """Draws relations by the rule: 2 for images of one class, 1 for classes of one kind, 0 for any other."""
    assert images.labels is not None
    labels = images.labels.numpy()
    kinds = np.array(KINDS)[labels]
    wanted = {"pairs": (2, 0), "triplets": (2, 0), "ranked": (2, 2, 1, 1, 0, 0, 0, 0)}[kind]
    rows = np.empty((count, 1 + len(wanted)), np.int64)
    # No query comes twice before each has come once.
    rows[:, 0] = np.resize(generator.permutation(len(labels)), count)
    for row in rows:
        grade = (labels == labels[row[0]]).astype(int) + (kinds == kinds[row[0]])
        for column, relevance in enumerate(wanted, 1):
            # Trousers and bags are alone in their kind.
            able = np.flatnonzero(grade == relevance) if (grade == relevance).any() else np.flatnonzero(grade == 0)
            row[column] = generator.choice(np.setdiff1d(able, row[:column]))
    equal, alike = labels[rows[:, :1]] == labels[rows[:, 1:]], kinds[rows[:, :1]] == kinds[rows[:, 1:]]
    return Relations(rows, equal.astype(np.int64) + alike)


def write(file: Path, kind: str, images: Images, generator: np.random.Generator) -> None:
    """Writes a file of relations of one kind."""
    names, (rows, relevances) = images.names, drawn(kind, images, SEEN, generator)
    lines = ["a,b,same"]
    if kind == "pairs":
        # Of every query one pair, similar or not.
        chosen = generator.integers(2, size=len(rows))
        lines += [f"{names[row[0]]},{names[row[1 + side]]},{1 - side}" for row, side in zip(rows, chosen, strict=True)]
    elif kind == "triplets":
        lines = ["anchor,positive,negative", *(",".join(names[image] for image in row) for row in rows)]
    else:
        lines = ["query,item,relevance"]
        for (query, *items), grades in zip(rows, relevances, strict=True):
            lines += [f"{names[query]},{names[item]},{grade}" for item, grade in zip(items, grades, strict=True)]
    file.write_text("\n".join(lines) + "\n")


def right(kind: str, features: Float[Tensor, "images dim"], relations: Relations) -> float:
    """Share of pairs of items in the right order, by cosine; of pairs, of similar ones before dissimilar ones."""
    unit = torch.nn.functional.normalize(features.double())
    rows, relevances = torch.from_numpy(relations.rows), torch.from_numpy(relations.relevances)
    cosines = torch.einsum("rd,rid->ri", unit[rows[:, 0]], unit[rows[:, 1:]])
    if kind == "pairs":
        # A pair has one number for all queries.
        cosines, relevances = cosines.reshape(1, -1), relevances.reshape(1, -1)
    ordered = relevances[:, :, None] > relevances[:, None]
    return float(((cosines[:, :, None] > cosines[:, None]) & ordered).sum() / ordered.sum())
