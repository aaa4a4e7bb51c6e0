"""The formulas for memory, traffic and arithmetic against measurements, and docs/scaling.md against the formulas."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manyviews.engine import tiles
from manyviews.objectives import (
    CPC,
    Bank,
    Contrastive,
    InBatch,
    LogRatio,
    Margin,
    MarginSoftmax,
    NearestNeighbours,
    NoiseContrastive,
    NPair,
    Population,
    Queue,
    Ranking,
    Supervised,
    Triplet,
)
from manyviews.objectives import OBJECTIVES as ALL
from manyviews.objectives.cost import Cost, Sizes, amount
from manyviews.objectives.mining import DistanceWeighted, Hardest
from manyviews.objectives.settings import ObjectiveSettings
from manyviews.system import distributed
from processes import start

BATCH, DIM, IMAGES = 64, 24, 203
LOCAL = 2
"""Local views of the objectives that have "local" in their names."""
VIEWS = {
    "cpc": 18,
    "cpc, farther rows": 32,
    "n_pair, five views, both ways round": 5,
    "supervised": 3,
    "nearest_neighbours": 3,
    "bank": 1,
}
OBJECTIVES: dict[str, ObjectiveSettings] = {
    "in_batch": InBatch(),
    "in_batch, hard negatives": InBatch(hardness=0.5, positive_probability=0.1),
    "in_batch, bilinear": InBatch(score="bilinear"),
    "in_batch, bilinear, hard negatives": InBatch(score="bilinear", hardness=0.5),
    "cpc": CPC(),
    "cpc, farther rows": CPC(steps=3, skip=1),
    "supervised": Supervised(),
    "nearest_neighbours": NearestNeighbours(size=70),
    "queue": Queue(size=70),
    "queue, symmetric": Queue(size=70, symmetric=True),
    "queue, per process": Queue(size=70, per_process=True, storage="bfloat16"),
    "bank": Bank(),
    "bank, two views": Bank(proximal=1.0),
    "bank, 16 bits": Bank(storage="float16"),
    "bank, nce": Bank(estimator="nce", negatives=40),
    "bank, nce, noise per image": Bank(estimator="nce", negatives=40, shared=False),
    "bank, nce, little noise per image": Bank(estimator="nce", negatives=3, shared=False),
    "bank, nce, exact Z": Bank(estimator="nce", negatives=40, normaliser="exact"),
    "bank, nce, first Z": Bank(estimator="nce", negatives=40, normaliser="first_batch"),
    "bank, nce, fixed Z": Bank(estimator="nce", negatives=40, normaliser=3.0),
    "bank, infonce": Bank(estimator="infonce", negatives=40),
    "bank, parametric": Bank(estimator="parametric"),
    "margin_softmax": MarginSoftmax(),
    "margin_softmax, of any length": MarginSoftmax(preset="sphereface"),
    # As much noise as draws every row.
    "noise_contrastive": NoiseContrastive(negatives=5_000),
    "noise_contrastive, negative sampling": NoiseContrastive(negatives=5_000, correction=False),
    "n_pair": NPair(),
    "n_pair, five views, both ways round": NPair(symmetric=True),
    "n_pair, one_vs_one": NPair(form="one_vs_one"),
    "log_ratio": LogRatio(),
    "ranking": Ranking(),
    "ranking, pairs": Ranking(loss="rank_net"),
    "contrastive": Contrastive(),
    "contrastive, one negative each": Contrastive(average="all", sampling=DistanceWeighted()),
    "triplet": Triplet(),
    "triplet, un-normalised": Triplet(normalized=False, sampling=Hardest()),
    "margin": Margin(),
    "in_batch, local": InBatch(),
    "in_batch, bilinear, local": InBatch(score="bilinear"),
    "supervised, local": Supervised(),
    "nearest_neighbours, local": NearestNeighbours(size=70),
    "queue, local": Queue(size=70),
    "queue, symmetric, local": Queue(size=70, symmetric=True),
    "bank, local": Bank(),
    "bank, nce, local": Bank(estimator="nce", negatives=40),
    "noise_contrastive, local": NoiseContrastive(negatives=5_000),
    "log_ratio, local": LogRatio(),
    "ranking, local": Ranking(),
    "triplet, local": Triplet(),
}
ENTERED = {name: settings() for name, settings in ALL.items() if name not in OBJECTIVES}
"""Those of the union that nobody has written down here."""
OBJECTIVES |= ENTERED
AGREEMENTS = 12
"""How often the processes may agree on a number of 8 bytes in a step: fewer bytes than one number for each anchor."""


def local(name: str) -> int:
    return LOCAL if "local" in name else 0


def views(name: str) -> int:
    return VIEWS.get(name, 2) + local(name)


def keys(name: str) -> int | None:
    return views(name) - LOCAL if local(name) else None


def predicted(name: str, processes: int) -> Cost:
    return OBJECTIVES[name].cost(Sizes(IMAGES, views(name), BATCH, DIM, processes, keys(name)))


class Products(TorchDispatchMode):
    """Counts the multiplications in matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name, factors = str(function.overloadpacket), [value for value in arguments if isinstance(value, Tensor)]
        if name in {"aten.mm", "aten.bmm", "aten.addmm", "aten.addmm_", "aten.baddbmm"}:
            self.count += factors[-2].numel() * factors[-1].shape[-1]
        return function(*arguments, **(options or {}))


def step(objective: Any, name: str, number: int) -> Tensor:
    """One step of training on this process's share; the mean number of negatives."""
    generator = torch.Generator().manual_seed(number)
    traits, seen = OBJECTIVES[name].traits, views(name) - local(name)
    encoded = (1 if traits.splits_views else seen) + local(name)
    others = encoded if traits.twin_momentum is None else encoded - local(name)
    own = distributed.share(BATCH)
    ids = torch.randperm(IMAGES, generator=generator)[:BATCH]
    embeddings = torch.randn(encoded, BATCH, DIM, generator=generator)[:, own].requires_grad_()
    targets = torch.randn(others, BATCH, DIM, generator=generator)[:, own]
    loss = objective(embeddings, ids[own], targets, number)
    loss.total.backward()
    objective.update(embeddings.detach(), ids[own], targets)
    return loss.terms["negatives"]


def build(name: str) -> Any:
    settings = OBJECTIVES[name]
    values = torch.arange(1.0 * IMAGES).unsqueeze(1) if settings.traits.uses_values == "always" else None
    patches = math.isqrt(views(name) // 2) if isinstance(settings, CPC) else None
    population = Population(torch.arange(IMAGES), values, keys=keys(name), patches=patches)
    return settings.build(dim=DIM, population=population, seed=0)


def work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    found = {}
    for name in OBJECTIVES:
        objective = build(name)
        for number in range(2):
            step(objective, name, number)
        with distributed.traffic() as traffic:
            negatives = step(objective, name, 2)
        state = objective.state_dict()
        spread = [state[key] for key in objective.shards()]
        found[name] = {
            "traffic": traffic.received,
            "negatives": negatives.item(),
            "rows": len(spread[0]) if spread else 0,
            "memory": sum(tensor.nbytes for tensor in spread),
            "rest": sum(tensor.nbytes for tensor in state.values()) - sum(tensor.nbytes for tensor in spread),
        }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each process of 2 and of 4 finds."""
    found = []
    for count in (2, 4):
        folder = tmp_path_factory.mktemp("processes")
        start(work, (count, str(folder)), count=count)
        found.append([torch.load(folder / f"{rank}.pt") for rank in range(count)])
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_traffic_memory_and_negatives_are_what_processes_measure(
    name: str, measured: list[list[dict[str, Any]]]
) -> None:
    # What every process holds besides: a pointer, a count, a normaliser, a matrix; a digest of what it was built with.
    # A matrix for each of two steps.
    square = 4 * DIM**2
    rest = {"in_batch, bilinear": square, "log_ratio": 32, "cpc": 2 * square, "cpc, farther rows": 2 * square}.get(
        name.removesuffix(", hard negatives").removesuffix(", local"), 16
    )
    for ranks in measured:
        expected, found = predicted(name, len(ranks)), [rank[name] for rank in ranks]
        assert max(rank["rows"] for rank in found) == expected.rows
        assert max(rank["memory"] for rank in found) == expected.memory
        # Noise that falls on an anchor's own row is none.
        seen = sum(rank["negatives"] for rank in found) / len(ranks)
        assert seen == pytest.approx(expected.negatives, rel=0.05 if "nce" in name or "sampling" in name else 1e-6)
        for rank in found:
            assert 0 <= rank["traffic"] - expected.traffic <= AGREEMENTS * 8 * (len(ranks) - 1)
            assert rank["rest"] <= rest


@pytest.mark.parametrize("name", OBJECTIVES)
def test_products_are_those_that_one_process_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One piece of work after the other, in the thread that is watched.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    # Pairs that were sampled are few, and their gradient is then found without products.
    monkeypatch.setattr(tiles, "FEW", -1)
    objective = build(name)
    for number in range(2):
        step(objective, name, number)
    with Products() as products:
        step(objective, name, 2)
    expected = predicted(name, 1).products
    # Positives and normalisation are products too, of views alone; of a batch beside itself a part of the diagonal is
    # computed on both of its sides.
    rest = views(name) ** 2 * BATCH * DIM
    if isinstance(OBJECTIVES[name], InBatch | Supervised) or name in ENTERED:
        rest += 0.16 * expected
    if isinstance(OBJECTIVES[name], LogRatio):
        # Labels of one number, three in a row of squared distances.
        rest += 3 * (views(name) * BATCH) ** 2
    if isinstance(OBJECTIVES[name], MarginSoftmax | NoiseContrastive):
        # Learned rows are normalised too.
        rest += IMAGES * DIM
    assert expected <= products.count <= expected + rest


def test_a_process_holds_its_part_of_a_bank_and_the_traffic_does_not_know_how_long_it_is() -> None:
    one, eight = (Bank().cost(Sizes(1 << 20, 1, 256, 128, processes)) for processes in (1, 8))
    assert (eight.memory, eight.products) == (one.memory // 8, one.products // 8)
    assert Bank().cost(Sizes(1 << 30, 1, 256, 128, 8)).traffic == eight.traffic


SCALING = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
IMAGENET = {"images": 1_281_167, "batch": 256 * 8, "dim": 128, "processes": 8}
BILLION = {"images": 10**9, "batch": 256 * 64, "dim": 128, "processes": 64}
SIXTEEN_BITS: dict[str, Any] = {"storage": "bfloat16"}
EXAMPLES: list[tuple[str, ObjectiveSettings, int, dict[str, int]]] = [
    ("ImageNet, in_batch", InBatch(), 2, IMAGENET),
    ("ImageNet, queue of 65,536", Queue(size=65_536), 2, IMAGENET),
    ("ImageNet, bank, exact", Bank(), 1, IMAGENET),
    ("ImageNet, bank, nce, m = 4,096", Bank(estimator="nce"), 1, IMAGENET),
    ("a billion, in_batch", InBatch(), 2, BILLION),
    ("a billion, queue of 65,536 for each process", Queue(size=65_536, per_process=True), 2, BILLION),
    ("a billion, bank, exact, bfloat16", Bank(**SIXTEEN_BITS), 1, BILLION),
    ("a billion, bank, nce, m = 65,536, bfloat16", Bank(estimator="nce", negatives=65_536, **SIXTEEN_BITS), 1, BILLION),
]
FORMULAS: dict[str, tuple[ObjectiveSettings, dict[str, int]]] = {
    "in_batch": (InBatch(), {"V": 2}),
    "queue": (Queue(size=640, storage="float16"), {"V": 1, "K": 640, "s": 2}),
    "bank, exact": (Bank(), {"V": 2, "s": 4}),
    "bank, nce": (Bank(estimator="nce", negatives=96, storage="bfloat16"), {"V": 2, "m": 96, "s": 2}),
    "triplet": (Triplet(), {"V": 2}),
    "margin_softmax": (MarginSoftmax(), {"V": 1}),
    "noise_contrastive": (NoiseContrastive(negatives=96), {"V": 2, "m": 96}),
}


def table(heading: str) -> list[list[str]]:
    """The cells of the page's table after a mark, row by row, without its head."""
    lines = SCALING.split(f"<!-- {heading} -->\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def written(name: str, settings: ObjectiveSettings, num_views: int, sizes: dict[str, int]) -> list[str]:
    """The row of the page's table for an example."""
    found = settings.cost(Sizes(views=num_views, **sizes))
    memory = amount(found.memory) if found.memory else "–"
    return [name, f"{found.negatives:,}", memory, amount(found.traffic), f"{found.products / 1e9:,.1f}"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_the_docs_work_through_the_numbers_of_the_functions(example: tuple[Any, ...]) -> None:
    rows = {row[0]: row for row in table("scale")}
    assert rows[example[0]] == written(*example)
    assert len(rows) == len(EXAMPLES)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("processes", [1, 4])
def test_the_formulas_in_the_docs_are_those_of_the_functions(name: str, processes: int) -> None:
    settings, symbols = FORMULAS[name]
    symbols = {"W": processes, "B": 512, "N": 4096, "D": 64, **symbols}
    found = settings.cost(Sizes(4096, symbols["V"], 512, 64, processes))
    cells = {row[0]: row[1:] for row in table("formulas")}[name]
    python = str.maketrans({"·": "*", "−": "-", "²": "**2", "`": ""})
    values = [eval(cell.translate(python), {}, symbols) for cell in cells]
    assert values == [found.negatives, found.memory, found.traffic, found.products]


def test_the_docs_compare_with_a_resnet_50_of_the_right_size() -> None:
    text = " ".join(SCALING.split())
    assert f"each of 8 GPUs receives {2 * 4 * 25.6e6 * 7 / 8 / 1e6:.0f} MB" in text
    encoder = 3 * 4.1e9 * 256
    bank, billion = (settings.cost(Sizes(views=1, **sizes)).products for _, settings, _, sizes in EXAMPLES[2::4])
    assert f"takes {encoder / 1e9:,.0f}" in text
    assert f"{100 * bank / encoder:.0f} % of that arithmetic" in text
    assert f"{billion / encoder:.0f} times as much" in text
    assert f"once in {10**9 / BILLION['batch']:,.0f} steps" in text


def test_a_cost_is_said_in_one_line() -> None:
    assert str(Bank().cost(Sizes(60_000, 1, 256, 128, 2))) == (
        "59,999 per anchor, 30,000 rows on each process (15.5 MB), 266 kB received by each process per step"
    )
    assert str(InBatch().cost(Sizes(60_000, 2, 256, 128, 1))) == "510 per anchor"
    assert [amount(count) for count in (7, 7_000, 12_345_678, 5 * 10**13)] == [
        "7 bytes",
        "7.0 kB",
        "12.3 MB",
        "50.0 TB",
    ]
