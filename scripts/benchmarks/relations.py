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
from manyviews.data import Images, Sample, read_relations
from manyviews.features.backbone import open_run, seeded_backbone
from manyviews.features.encoding import extract
from manyviews.features.layers import EMBEDDING, Layers, OneLayer
from manyviews.linear_metrics import MMC
from manyviews.views import StandardView

KINDS = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)
"""Tops, trousers, shoes or bags, for each of Fashion-MNIST's ten classes."""
SEEN, ITEMS = 300, 8
"""Relations in a file, and items of a ranked list."""
UNSEEN = 2_000
"""Relations of held-out images that are judged."""
VIEWS = ("views.num_views=1", "views.crop_scale=[0.6,1.0]", "views.brightness=0", "views.contrast=0", "views.blur=0")


class Case(NamedTuple):
    """A kind of relations and what is trained by them."""

    kind: str
    words: tuple[str, ...]


CASES: Mapping[str, Case] = {
    "MMC of untrained features": Case("pairs", ()),
    "contrastive": Case("pairs", ("objective=contrastive",)),
    "triplet": Case("triplets", ("objective=triplet",)),
    "ranking: RankNet": Case("ranked", ("objective=ranking", "objective.loss=rank_net")),
    "margin": Case("triplets", ("objective=margin",)),
    "ranking: ListNet": Case("ranked", ("objective=ranking", "objective.loss=list_net")),
}
BATCHES = {"pairs": 60, "triplets": 60, "ranked": 63}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and for how long."""
    parser.add_argument("--images", type=int, default=6_000, help="images passed in training, for each run (6,000)")
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
    folder.mkdir(parents=True, exist_ok=True)
    file, run_folder = folder / f"{case.kind}-{seed}.csv", folder / harness.file_name(f"{name} {seed}")
    write(file, case.kind, split.train, np.random.default_rng(seed))
    unseen = drawn(case.kind, split.test, UNSEEN, np.random.default_rng(1000 + seed))
    view, untrained = StandardView(28, 1), seeded_backbone("light_resnet", seed, 1, 28)
    before = extract(untrained, split.test, view=view)
    if not case.words:
        relations = read_relations(file, split.train.names)
        used, pairs = relations.ids.unique(return_inverse=True)
        metric = MMC().fit_pairs(extract(untrained, split.train, view=view, ids=used), pairs, relations.numbers)
        share, plain = (right(case.kind, rows, unseen, euclidean=True) for rows in (metric.transform(before), before))
        return share, share, plain
    if not (run_folder / "done").exists():
        words = [f"data.relations={file}", *VIEWS, *case.words, f"train.batch_size={BATCHES[case.kind]}"]
        length = {"pairs": 2, "triplets": 3, "ranked": 1 + ITEMS}[case.kind] * SEEN
        words += [f"train.epochs={images / length}", "train.precision=fp32", "train.monitor=0", "train.preview=0"]
        words += ["resume=true"] if run_folder.exists() else []
        harness.commands(2, ["pretrain", "quickstart", *words, f"seed={seed}", f"output={run_folder}"])
    opened = open_run(run_folder)
    backbone = opened.backbone()
    embedding = OneLayer(Layers(backbone, [EMBEDDING], {EMBEDDING: opened.head(EMBEDDING).module}))
    learned = [extract(module, split.test, view=view) for module in (embedding, backbone)]
    first, second, last = (right(case.kind, rows, unseen) for rows in (*learned, before))
    return first, second, last


class Relations(NamedTuple):
    """Relations as rows of indices of images, the first the query, and the relevance of the others to it."""

    rows: Int[np.ndarray, "relations images"]
    relevances: Int[np.ndarray, "relations items"]


def drawn(kind: str, images: Images, count: int, generator: np.random.Generator) -> Relations:
    """Draws relations by the rule: 2 for images of one class, 1 for classes of one kind, 0 for any other."""
    assert images.labels is not None
    labels = images.labels.numpy()
    kinds = np.array(KINDS)[labels] if kind == "ranked" else labels
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
    drawn_rows = drawn(kind, images, SEEN, generator)
    rows = [[images.names[image] for image in row] for row in drawn_rows.rows.tolist()]
    if kind == "pairs":
        # Of every query one pair, similar or not.
        chosen = generator.integers(2, size=len(rows)).tolist()
        lines = ["a,b,same", *(f"{row[0]},{row[1 + side]},{1 - side}" for row, side in zip(rows, chosen, strict=True))]
    elif kind == "triplets":
        lines = ["anchor,positive,negative", *map(",".join, rows)]
    else:
        lines = ["query,item,relevance"]
        for (query, *items), grades in zip(rows, drawn_rows.relevances.tolist(), strict=True):
            lines += [f"{query},{item},{grade}" for item, grade in zip(items, grades, strict=True)]
    file.write_text("\n".join(lines) + "\n")


def right(kind: str, features: Float[Tensor, "images dim"], relations: Relations, *, euclidean: bool = False) -> float:
    """Share of items in the right order, by cosine or distance; of pairs, of similar ones before dissimilar ones."""
    points = features.double() if euclidean else torch.nn.functional.normalize(features.double())
    rows, relevances = torch.from_numpy(relations.rows), torch.from_numpy(relations.relevances)
    # On the unit sphere the distance orders as the cosine does.
    nearness = -(points[rows[:, :1]] - points[rows[:, 1:]]).norm(dim=2)
    if kind == "pairs":
        # A pair has one number for all queries.
        nearness, relevances = nearness.reshape(1, -1), relevances.reshape(1, -1)
    ordered = relevances[:, :, None] > relevances[:, None]
    return float(((nearness[:, :, None] > nearness[:, None]) & ordered).sum() / ordered.sum())
