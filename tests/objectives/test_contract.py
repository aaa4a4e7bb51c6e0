"""What every objective of the union keeps: a new one enters by itself, with its default settings."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manyviews.engine import pairs, softmax, tiles
from manyviews.objectives import (
    CPC,
    OBJECTIVES,
    Bank,
    Contrastive,
    InBatch,
    LogRatio,
    Margin,
    MarginSoftmax,
    NearestNeighbours,
    NoiseContrastive,
    NPair,
    Queue,
    Ranking,
    Supervised,
    Triplet,
    noise,
)
from manyviews.objectives.cost import Cost, Sizes
from manyviews.objectives.mining import All, DistanceWeighted, Easiest, Hard, Hardest, Random, SemiHard, WithinMargin
from manyviews.objectives.objective import Loss, Objective
from manyviews.objectives.relations import Kind, Lists, Relations
from manyviews.objectives.settings import ObjectiveSettings, Population
from manyviews.system import distributed
from processes import start

BATCHES, INPUTS, DIM, IMAGES = [8, 8, 5, 8], 6, 5, 41
"""The third batch is uneven on 2 and on 4 processes; neither bank nor queue divides evenly."""


class Case(NamedTuple):
    """An objective and how it is trained here."""

    settings: ObjectiveSettings
    views: int = 2
    classes: int = IMAGES
    values: bool = False
    """Whether images have continuous labels; they have in any case where the objective needs them."""
    rate: float = 1.0
    """Of learning: embeddings that are not normalised would grow without bound."""
    local: int = 0
    """Local views, which come after the others."""
    narrow: bool = True
    """Whether float32 is good to 1e-6 over a few steps: not for products of long embeddings, which are exponents, for
    small distances, and at a temperature of 0.01."""
    relations: Relations | None = None
    """Of which batches are made."""
    patches: int | None = None
    """On a side of the grid of each image, whose patches and contexts are then in the place of views."""

    @property
    def keys(self) -> int | None:
        return self.views if self.local else None

    @property
    def size(self) -> int:
        """Images that are not torn apart."""
        return 1 if self.relations is None else self.relations.size

    def batch(self, images: int) -> int:
        """As many images, or half as many lists."""
        return images if self.size == 1 else (images + 1) // 2 * self.size

    def build(self, *, seed: int = 3) -> Objective:
        needed = self.values or self.settings.traits.uses_values == "always"
        values = torch.sin(torch.arange(2.0 * IMAGES)).view(IMAGES, 2) if needed else None
        lists = None if self.relations is None else Lists(self.relations)
        ids = torch.arange(IMAGES) % self.classes
        population = Population(ids, values, keys=self.keys, lists=lists, patches=self.patches)
        return self.settings.build(dim=DIM, population=population, seed=seed)

    def encoded(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the views the encoder gets, and which the twin."""
        traits, seen = self.settings.traits, views[: self.views]
        if traits.splits_views:
            return torch.cat([views[:1], views[self.views :]]), seen[1:]
        return views, views if traits.twin_momentum is None else seen


def related(kind: Kind, *, others: bool = False) -> Relations:
    """Relations of many of the images: of two thirds of all pairs, or a fifth of all triplets."""
    every = torch.arange(IMAGES)
    rows = torch.cartesian_prod(*[every] * (3 if kind == "triplets" else 2))
    apart = (rows[:, 0] != rows[:, 1]) & (rows[:, 0] != rows[:, -1]) & (rows[:, 1:2] != rows[:, 2:]).all(1)
    rows = rows[apart & ((rows * torch.arange(1, rows.shape[1] + 1)).sum(1) % 5 < (1 if kind == "triplets" else 3))]
    grades = (rows.prod(1, keepdim=True) % 5).float()
    relevances = {"triplets": torch.tensor([1.0, 0.0]).repeat(len(rows), 1), "pairs": grades / 4, "ranked": grades}
    return Relations(kind, rows, relevances[kind], size=2 if kind == "pairs" else 3, others=others)


CASES: dict[str, Case] = {
    "in_batch": Case(InBatch()),
    "in_batch, decoupled": Case(InBatch(decoupled=True)),
    "in_batch, three views": Case(InBatch(temperature=0.5), views=3),
    "in_batch, cold": Case(InBatch(temperature=0.01), narrow=False),
    "in_batch, debiased": Case(InBatch(positive_probability=0.1)),
    "in_batch, hard": Case(InBatch(temperature=0.5, positive_probability=0.1, hardness=1.0)),
    "in_batch, bilinear": Case(InBatch(score="bilinear", temperature=20.0)),
    "in_batch, bilinear, hard": Case(
        InBatch(score="bilinear", temperature=20.0, hardness=0.5, decoupled=True), views=3
    ),
    "cpc": Case(CPC(temperature=20.0), views=18, patches=3),
    "cpc, farther rows": Case(CPC(temperature=20.0, steps=3, skip=1), views=32, patches=4),
    "supervised": Case(Supervised()),
    "supervised, three views": Case(Supervised(temperature=0.5), views=3),
    "nearest_neighbours": Case(NearestNeighbours(size=27)),
    "nearest_neighbours, three views": Case(NearestNeighbours(size=5), views=3),
    "queue": Case(Queue(size=27)),
    "queue, cold": Case(Queue(size=27, temperature=0.01), narrow=False),
    "queue, symmetric": Case(Queue(size=5, symmetric=True)),
    "queue, classes": Case(Queue(size=27), classes=5),
    "queue, symmetric, classes": Case(Queue(size=13, symmetric=True), classes=5),
    "bank": Case(Bank()),
    "bank, 16 bits": Case(Bank(storage="bfloat16")),
    "bank, cold": Case(Bank(temperature=0.01), narrow=False),
    "bank, one view": Case(Bank(momentum=0.0), views=1),
    "bank, proximal": Case(Bank(proximal=2.0)),
    "bank, nce": Case(Bank(estimator="nce", negatives=12)),
    "bank, nce, noise per image": Case(Bank(estimator="nce", negatives=12, shared=False)),
    "bank, nce, one noise row": Case(Bank(estimator="nce", negatives=1)),
    "bank, nce, exact Z": Case(Bank(estimator="nce", negatives=12, normaliser="exact")),
    "bank, nce, exact Z, refreshed": Case(Bank(estimator="nce", negatives=12, normaliser="exact", normaliser_every=2)),
    "bank, nce, first Z": Case(Bank(estimator="nce", negatives=12, normaliser="first_batch")),
    "bank, nce, given Z": Case(Bank(estimator="nce", negatives=12, normaliser=30.0)),
    "bank, infonce": Case(Bank(estimator="infonce", negatives=12)),
    "bank, infonce, noise per image": Case(Bank(estimator="infonce", negatives=12, shared=False)),
    "bank, infonce, one noise row": Case(Bank(estimator="infonce", negatives=1, shared=False)),
    "bank, parametric": Case(Bank(estimator="parametric", temperature=0.2)),
    "margin_softmax": Case(MarginSoftmax()),
    "margin_softmax, of any length": Case(MarginSoftmax(preset="sphereface"), views=1),
    "noise_contrastive": Case(NoiseContrastive(negatives=12, temperature=0.5)),
    "noise_contrastive, one noise row": Case(NoiseContrastive(negatives=1, power=0.0, normaliser=3.0), views=1),
    "noise_contrastive, sampling": Case(NoiseContrastive(negatives=60, correction=False, temperature=0.5)),
    "noise_contrastive, sampling for all": Case(NoiseContrastive(negatives=60, correction=False, shared=True)),
    "noise_contrastive, noise for each": Case(NoiseContrastive(negatives=12, temperature=0.5, shared=False)),
    "noise_contrastive, classes": Case(NoiseContrastive(negatives=3, correction=False, temperature=0.5), classes=7),
    "n_pair": Case(NPair(), rate=1e-3, narrow=False),
    "n_pair, both ways round": Case(NPair(symmetric=True), rate=1e-3, narrow=False),
    "n_pair, one_vs_one, both ways round": Case(NPair(form="one_vs_one", symmetric=True), rate=1e-3, narrow=False),
    "n_pair, three views, both ways round": Case(
        NPair(symmetric=True, norm_penalty=0.1), views=3, rate=1e-3, narrow=False
    ),
    "n_pair, one_vs_one": Case(NPair(form="one_vs_one"), rate=1e-3, narrow=False),
    "log_ratio": Case(LogRatio(), narrow=False),
    "log_ratio, one view": Case(LogRatio(squared="embeddings"), views=1, narrow=False),
    "ranking, squared_error": Case(Ranking(loss="squared_error")),
    "ranking, cross_entropy": Case(Ranking(loss="cross_entropy")),
    "ranking, rank_net": Case(Ranking(loss="rank_net"), views=3),
    "ranking, hinge": Case(Ranking(loss="hinge"), views=3),
    "ranking, list_mle": Case(Ranking(loss="list_mle"), views=3),
    "ranking, hinge, values": Case(Ranking(loss="hinge"), values=True),
    "ranking, list_mle, values": Case(Ranking(loss="list_mle"), views=1, values=True),
    "contrastive": Case(Contrastive()),
    "contrastive, un-normalised": Case(Contrastive(margin=5.0, form="hinge", normalized=False, average="all")),
    "contrastive, hinge of squares": Case(Contrastive(margin=1.5, form="hinge_of_squares")),
    "contrastive, random": Case(Contrastive(sampling=Random(positives="random"), average="all")),
    "contrastive, distance-weighted": Case(Contrastive(margin=1.4, sampling=DistanceWeighted())),
    "triplet": Case(Triplet(margin=1.0)),
    "triplet, all": Case(Triplet(sampling=All())),
    "triplet, all, soft": Case(Triplet(sampling=All(), form="soft", squared=False, normalized=False)),
    "triplet, all, softmax": Case(Triplet(sampling=All(), form="softmax", squared=False)),
    "triplet, all, ratio": Case(Triplet(sampling=All(), form="ratio", margin=0.5)),
    "triplet, ratio": Case(Triplet(form="ratio", squared=False)),
    "triplet, within the margin": Case(Triplet(sampling=WithinMargin(), margin=1.0)),
    "triplet, hard": Case(Triplet(sampling=Hard())),
    "triplet, semi-hard or left out": Case(Triplet(sampling=SemiHard(fallback=None))),
    "triplet, hardest, one view": Case(Triplet(sampling=Hardest(), squared=False), views=1),
    "triplet, hardest, un-normalised": Case(Triplet(sampling=Hardest(), normalized=False)),
    "triplet, easiest, three views": Case(Triplet(sampling=Easiest(), average="all", margin=1.0), views=3),
    "margin": Case(Margin()),
    "margin, a boundary for each id": Case(Margin(beta_per="class", nu=0.1, sampling=SemiHard())),
    "margin, within the margin": Case(Margin(sampling=WithinMargin(margin=0.6))),
    "margin, all": Case(Margin(sampling=All(), nu=0.1)),
    "in_batch, local": Case(InBatch(), local=3),
    "in_batch, three views, local": Case(InBatch(temperature=0.5, decoupled=True), views=3, local=2),
    "in_batch, hard, local": Case(InBatch(temperature=0.5, positive_probability=0.1, hardness=1.0), local=3),
    "in_batch, bilinear, local": Case(InBatch(score="bilinear", temperature=20.0, hardness=0.5), local=2),
    "supervised, local": Case(Supervised(), local=3),
    "supervised, classes, one view, local": Case(Supervised(), views=1, local=2, classes=7),
    "nearest_neighbours, local": Case(NearestNeighbours(size=27), local=2),
    "queue, local": Case(Queue(size=27), local=3),
    "queue, symmetric, local": Case(Queue(size=5, symmetric=True), local=2),
    "queue, symmetric, classes, local": Case(Queue(size=13, symmetric=True), classes=5, local=2),
    "bank, local": Case(Bank(), local=2),
    "bank, nce, local": Case(Bank(estimator="nce", negatives=12, shared=False), views=1, local=2),
    "noise_contrastive, local": Case(NoiseContrastive(negatives=12, temperature=0.5), local=2),
    "margin_softmax, local": Case(MarginSoftmax(), local=2),
    "log_ratio, local": Case(LogRatio(), views=1, local=2, narrow=False),
    "ranking, list_net, local": Case(Ranking(), local=2),
    "ranking, cross_entropy, local": Case(Ranking(loss="cross_entropy"), local=2),
    "ranking, rank_net, local": Case(Ranking(loss="rank_net"), local=2),
    "ranking, list_mle, values, local": Case(Ranking(loss="list_mle"), local=2, values=True),
    "contrastive, local": Case(Contrastive(), local=2),
    "contrastive, random, local": Case(Contrastive(sampling=Random(positives="random")), local=2),
    "triplet, local": Case(Triplet(margin=1.0), local=2),
    "triplet, all, local": Case(Triplet(sampling=All()), local=2),
    "triplet, hardest, one view, local": Case(Triplet(sampling=Hardest(), squared=False), views=1, local=2),
    "margin, local": Case(Margin(), local=2),
    "margin, semi-hard, one view, local": Case(Margin(sampling=SemiHard()), views=1, local=2),
    "contrastive, pairs": Case(Contrastive(), relations=related("pairs", others=True)),
    "contrastive, pairs, un-normalised": Case(
        Contrastive(margin=5.0, form="hinge", normalized=False), views=1, relations=related("pairs")
    ),
    "triplet, triplets": Case(Triplet(margin=1.0), relations=related("triplets")),
    "triplet, ranked, local": Case(Triplet(form="soft"), views=1, local=2, relations=related("ranked", others=True)),
    "margin, triplets": Case(Margin(beta_per="class", nu=0.1), relations=related("triplets", others=True)),
    "log_ratio, triplets": Case(LogRatio(), narrow=False, relations=related("triplets")),
    "ranking, cross_entropy, ranked": Case(Ranking(loss="cross_entropy"), relations=related("ranked", others=True)),
    "ranking, hinge, ranked": Case(Ranking(loss="hinge"), views=1, relations=related("ranked")),
    "ranking, list_mle, ranked": Case(Ranking(loss="list_mle"), views=1, relations=related("ranked", others=True)),
    "n_pair, ranked": Case(NPair(), rate=1e-3, narrow=False, relations=related("ranked", others=True)),
    "n_pair, one_vs_one, triplets": Case(
        NPair(form="one_vs_one"), views=1, rate=1e-3, narrow=False, relations=related("triplets")
    ),
    "noise_contrastive, pairs": Case(
        NoiseContrastive(negatives=12, correction=False, temperature=0.5), relations=related("pairs")
    ),
}
for name, settings in OBJECTIVES.items():
    CASES.setdefault(name, Case(settings(), views=max(2, settings().traits.fewest_views)))

SHARED = ("information", "ceiling", "active", "easy", "semi_hard", "hard", "without_negative", "fallback")
GATHERED = ("bank, nce, noise per image", "bank, infonce, noise per image")
every = pytest.mark.parametrize("name", CASES)


def step(objective: Objective, case: Case, views: Tensor, ids: Tensor, number: int) -> Loss:
    """A step of training by embeddings that are the twin's too."""
    embeddings, targets = case.encoded(views)
    loss: Loss = objective(embeddings, ids, targets.detach(), number)
    objective.update(embeddings.detach(), ids, targets.detach())
    return loss


def drawn(case: Case, batch: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings of some images, one of which comes twice, and their ids."""
    generator = torch.Generator().manual_seed(seed)
    batch = case.batch(batch)
    ids = torch.randperm(IMAGES, generator=generator)[:batch] % case.classes
    ids[-1] = ids[0]
    return torch.randn(case.views + case.local, batch, DIM, generator=generator, dtype=torch.float64), ids


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_under_autocast_it_computes_in_float32_whatever_embeddings_it_gets(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    views, ids = drawn(case)
    given = views.to(dtype)
    inside, outside = case.build(), case.build()
    for number in range(2):
        z = given.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
            found = step(inside, case, z, ids, number).total
        expected = step(outside, case, given.float(), ids, number).total
        assert found.dtype == torch.float32
        if dtype == torch.float32:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.autograd.grad(found, z)[0].isfinite().all()


@every
def test_float32_is_close_to_float64(name: str) -> None:
    case = CASES[name]
    views, ids = drawn(case)
    wide, narrow = case.build().double(), case.build().float()
    found, expected = (
        step(one, case, views.to(dtype), ids, 0).total
        for one, dtype in ((narrow, torch.float32), (wide, torch.float64))
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4 if "cold" in name else 1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [4] * 6], ids=["apart", "pairs", "one id"])
def test_points_that_coincide_oppose_vanish_or_are_far_have_finite_gradients(name: str, ids: list[int]) -> None:
    case = CASES[name]
    cold = {"temperature": 0.01} if "temperature" in type(case.settings).model_fields else {}
    point = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5])
    random = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    opposite = point * torch.tensor([1.0, 1.0, -1.0] * 2)[:, None]
    for rows in (point.repeat(6, 1), opposite, torch.zeros(6, DIM), 300 * random, random + 1000, random):
        for settings in (case.settings, case.settings.model_copy(update=cold)):
            objective = case._replace(settings=settings).build()
            for number in range(2):
                z = rows.repeat(case.views + case.local, 1, 1).requires_grad_()
                loss = step(objective, case, z, torch.tensor(ids) % case.classes, number).total
                assert loss.isfinite()
                gradients = torch.autograd.grad(loss, [z, *objective.parameters()], allow_unused=True)
                assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@every
def test_the_seed_and_the_step_decide_everything_and_only_an_update_moves_the_state(name: str) -> None:
    case = CASES[name]
    views, ids = drawn(case)
    random, losses = torch.get_rng_state(), []
    for _ in range(2):
        objective = case.build().double()
        before = {key: value.clone() for key, value in objective.state_dict().items()}
        embeddings, targets = case.encoded(views)
        objective(embeddings, ids, targets, 0)
        assert all(
            torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in objective.state_dict().items()
        )
        losses.append(torch.stack([step(objective, case, views, ids, number).total.detach() for number in range(3)]))
    assert torch.equal(*losses)
    assert torch.equal(torch.get_rng_state(), random)
    again = case.build().double()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(step(again, case, views, ids, 3).total, step(objective, case, views, ids, 3).total)
    assert objective.shards().keys() <= objective.state_dict().keys()
    other, rows = case.build(seed=4).state_dict(), case.build().state_dict()
    assert not any(torch.equal(rows[key], other[key]) for key in objective.shards() if rows[key].is_floating_point())


@every
def test_the_size_of_the_tiles_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    views, ids = drawn(case)
    z = views.requires_grad_()
    found = []
    for small in (False, True):
        if small:
            monkeypatch.setattr(tiles, "NUMBERS", 25)
            for module in (pairs, softmax):
                monkeypatch.setattr(module, "tile_shape", lambda device: (2, 3))
        loss = step(case.build().double(), case, z, ids, 0).total
        found.append([loss, torch.autograd.grad(loss, z)[0]])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_an_objective_without_a_cost_cannot_be_made() -> None:
    class Free(ObjectiveSettings):
        def build(self, *, dim: int, population: Population, seed: int) -> Objective:
            raise NotImplementedError

    with pytest.raises(TypeError, match="cost"):
        Free()


@every
def test_one_process_receives_nothing_and_more_of_them_share_the_work(name: str) -> None:
    case = CASES[name]
    views = case.views + case.local
    one, four = (case.settings.cost(Sizes(IMAGES, views, 64, DIM, processes, case.keys)) for processes in (1, 4))
    assert isinstance(one, Cost)
    assert one.traffic == 0 < min(four.traffic, one.products, one.negatives)
    assert four.products <= one.products


def train(case: Case, *, double: bool = True, device: str = "cpu") -> dict[str, Any]:
    """A few steps of a linear encoder on this process's share of fixed batches; figures are means over processes."""
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    twin = torch.randn(INPUTS, DIM, generator=generator, dtype=torch.float64).to(device, dtype)
    objective = case.build().to(device, dtype)
    learned = [weight, *objective.parameters()]
    losses, gradients = [], []
    for number, batch in enumerate(map(case.batch, BATCHES)):
        lists = distributed.share(batch // case.size)
        own = slice(lists.start * case.size, lists.stop * case.size)
        shape = (case.views + case.local, batch, INPUTS)
        images = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        # The second half is another kind of data: a gradient that forgets the other processes shows.
        images[:, batch // 2 :] = images[:, batch // 2 :].abs() * 3 + 1
        ids = torch.randperm(IMAGES, generator=generator)[:batch]
        ids[-1], ids[1] = ids[0], ids[2]  # one image on two processes, one twice on the same
        ids = (ids % case.classes).to(device)
        images = images.to(device)
        embeddings, targets = case.encoded(images[:, own] @ weight)[0], case.encoded(images[:, own] @ twin)[1]
        loss, terms = objective(embeddings, ids[own], targets, number)
        found = torch.autograd.grad(loss, learned)
        gradients.append(distributed.mean(found[0]))
        # The terms that are shares of the whole batch, beside its loss.
        shared = [terms[name].to(loss) for name in SHARED if name in terms]
        losses.append(distributed.mean(torch.stack([loss, *shared])))
        with torch.no_grad():
            weight -= gradients[-1] * case.rate
            for (name, parameter), gradient in zip(objective.named_parameters(), found[1:], strict=True):
                # What is spread over the processes has the sum of their gradients, what is alike on all a part of it.
                parameter -= (
                    gradient / distributed.world_size() if name in objective.shards() else distributed.mean(gradient)
                )
        objective.update(embeddings.detach(), ids[own], targets)
    spread = objective.shards()
    state = {name: value.detach() for name, value in objective.state_dict().items()}
    whole = {
        name: distributed.gather_without_gradient(value) if name in spread else value.clone()
        for name, value in state.items()
    }
    parts = {f"{name}, own": len(value) for name, value in state.items() if name in spread}
    lengths = {f"{name}, all": length for name, length in spread.items()}
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), **whole, **parts, **lengths}


@functools.cache
def by_one(name: str, *, double: bool = True) -> dict[str, Any]:
    """What one process makes of it."""
    return train(CASES[name], double=double)


def in_float32(name: str, processes: int) -> bool:
    """Whether a case is also compared in float32: on 4 processes only the default settings of each objective."""
    return CASES[name].narrow and (processes == 2 or "," not in name)


def _keep_own(whole: Tensor, lengths: list[int]) -> Tensor:
    """A wrong way home: what this process found for its own rows, without what the others found for them."""
    return whole.split(list(lengths))[distributed.rank()]


def work(rank: int, size: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size)
    found: dict[str, Any] = {name: train(CASES[name]) for name in names}
    found |= {f"{name} in float32": train(CASES[name], double=False) for name in names if in_float32(name, size)}
    right, distributed.scatter_sum = distributed.scatter_sum, _keep_own
    found["wrong"] = train(CASES["in_batch"])
    distributed.scatter_sum = right
    noise.DENSE = 0
    for name in GATHERED:
        found[f"{name}, gathered"] = train(CASES[name])
    pairs.tile_shape = softmax.tile_shape = lambda device: (2, 3)
    found["small tiles"] = train(CASES["in_batch, three views"])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda size: f"{size} processes"
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    # Those of the tests that were chosen.
    names = [name for name in CASES if any(f"-{name}]" in item.name for item in request.session.items)]
    start(work, (size, names, str(folder)), count=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def difference(found: dict[str, Any], expected: dict[str, Any], key: str) -> float:
    return ((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item()


@every
def test_several_processes_have_the_loss_gradient_and_state_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = by_one(name)
    for rank in ranks:
        for key in ("losses", "gradients"):
            assert difference(rank[name], alone, key) < 1e-10
            if in_float32(name, len(ranks)):
                narrow = by_one(name, double=False)
                assert difference(rank[f"{name} in float32"], narrow, key) < 1e-6
        assert rank[name].keys() == alone.keys()
        for key in alone.keys() - {"losses", "gradients"}:
            found, expected = rank[name][key], alone[key]
            if key.endswith(", own"):
                assert found in (expected // len(ranks), expected // len(ranks) + 1)
            elif key.endswith(", all"):
                assert found == expected == alone[key.replace("all", "own")]
            else:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
                assert torch.equal(found, ranks[0][name][key]) or found.isnan().all()
    for own in (key for key in alone if key.endswith(", own")):
        assert sum(rank[name][own] for rank in ranks) == alone[own]


def test_the_comparison_finds_gradients_that_do_not_come_home(ranks: list[dict[str, Any]]) -> None:
    alone = by_one("in_batch")
    assert abs(ranks[0]["wrong"]["losses"][0, 0] - alone["losses"][0, 0]) < 1e-10
    assert difference(ranks[0]["wrong"], alone, "gradients") > 1e-2


def test_tiles_smaller_than_a_share_change_nothing(ranks: list[dict[str, Any]]) -> None:
    alone = by_one("in_batch, three views")
    for key in ("losses", "gradients"):
        assert difference(ranks[0]["small tiles"], alone, key) < 1e-10


@pytest.mark.parametrize("name", GATHERED)
def test_noise_rows_that_are_gathered_give_what_products_with_all_rows_give(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    alone = by_one(name)
    for key in ("losses", "gradients", "rows"):
        assert difference(ranks[-1][f"{name}, gathered"], alone, key) < 1e-10
