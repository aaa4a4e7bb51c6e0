"""Stage 2: objectives, engine, views, evaluators and linear metrics give on the GPU what they give on the CPU."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gpu_checks import evaluators, launches
from gpu_checks.measure import Row, Setup, agreement, attempted, error
from manyviews import recipe as recipes
from manyviews.config import load
from manyviews.data.images import Pictures
from manyviews.engine import log_sum_exp, normalize, top_k
from manyviews.objectives import Population
from manyviews.recipe import Recipe
from manyviews.views import ViewsSettings

CLASSES = 10
PATCHES = 3
"""Patches on a side of an image, for objectives that predict them."""
TOLERANCE = 2e-3
"""Of a float32 result: sums in another order, and products of ten bits where a bound allows them."""
SIXTEEN_BITS = 2e-2
"""Where rows are stored, or multiplied, with the 8 significant bits of bfloat16."""
VARIANTS: dict[str, Sequence[str]] = {
    "decoupled, three views": ("objective=in_batch", "objective.decoupled=true", "views.num_views=3"),
    "debiased, hard negatives": (
        *("objective=in_batch", "objective.positive_probability=0.1"),
        *("objective.hardness=0.5", "objective.temperature=0.5"),
    ),
    "bilinear score": ("objective=in_batch", "objective.score=bilinear"),
    "cold": ("objective=in_batch", "objective.temperature=0.02"),
    "queue, one view for the twin": ("objective=queue", "objective.size=512"),
    "bank, proximal": ("objective=bank", "objective.proximal=2"),
    "bank of 16 bits": ("objective=bank", "objective.storage=bfloat16"),
    "bank, InfoNCE": ("objective=bank", "objective.estimator=infonce", "objective.negatives=64"),
    "bank, NCE with noise for each": (
        *("objective=bank", "objective.estimator=nce", "objective.negatives=64", "objective.shared=false"),
    ),
    "bank, parametric": ("objective=bank", "objective.estimator=parametric"),
    "RankNet": ("objective=ranking", "objective.loss=rank_net"),
    "ListMLE": ("objective=ranking", "objective.loss=list_mle"),
    "triplet, hardest": ("objective=triplet", "objective.sampling=hardest"),
    "triplet, all, soft": ("objective=triplet", "objective.sampling=all", "objective.form=soft"),
    "contrastive, distance-weighted": ("objective=contrastive", "objective.sampling=distance_weighted"),
    "one-vs-one N-pair": ("objective=n_pair", "objective.form=one_vs_one"),
    "word2vec": ("objective=noise_contrastive", "objective.correction=false", "objective.negatives=64"),
}


def rows(setup: Setup) -> Iterator[Row]:
    """Compares everything once; each error is relative to the largest number, or a share of answers."""
    yield from objectives(setup)
    yield from attempted("engine", partial(engine, setup))
    yield from attempted("views", partial(views, setup))
    yield from evaluators.rows(setup)
    yield from launches.rows(setup)


def objectives(setup: Setup) -> Iterator[Row]:
    """Loss, gradient and state after two steps, for each recipe and variant."""
    cases = [(name, load(Recipe, recipes.find(name))) for name in recipes.names()]
    cases += [(name, load(Recipe, None, list(args))) for name, args in VARIANTS.items()]
    for name, recipe in cases:
        yield from attempted(f"objective: {name}", partial(_objective, setup, name, recipe))


def _objective(setup: Setup, name: str, recipe: Recipe) -> Iterator[Row]:
    with torch.random.fork_rng(devices=[]):
        expected, actual = (_two_steps(recipe, device, setup) for device in (torch.device("cpu"), setup.device))
    narrow = getattr(recipe.objective, "storage", "float32") != "float32"
    errors = {part: error(actual[part], expected[part]) for part in expected}
    note = ", ".join(f"{part} {value:.1e}" for part, value in errors.items())
    yield agreement(f"objective: {name}", max(errors.values()), SIXTEEN_BITS if narrow else TOLERANCE, note)


def _two_steps(recipe: Recipe, device: torch.device, setup: Setup) -> dict[str, Tensor]:
    batch, dim = setup.pick(256, 16), setup.pick(128, 16)
    images = 8 * batch
    generator = torch.Generator().manual_seed(0)
    names = torch.arange(images) % (CLASSES if recipe.ids == "labels" else images)
    values = torch.randn(images, 4, generator=generator) if recipe.values is not None else None
    traits = recipe.objective.traits
    patches = PATCHES if traits.predicts_patches else None
    views = recipe.views.num_views if patches is None else 2 * patches**2
    population = Population(names, values, patches=patches)
    objective = recipe.objective.build(dim=dim, population=population, seed=0).to(device)
    losses, gradients = [], []
    for step in range(2):
        drawn = torch.randn(2, views, batch, dim, generator=generator)
        ids = names[torch.randperm(images, generator=generator)[:batch]].to(device)
        own, targets = ((part[:1], part[1:]) if traits.splits_views else (part, part) for part in drawn.unbind())
        embeddings = own[0].to(device).requires_grad_()
        goals = normalize(targets[1].to(device))
        loss = objective(embeddings, ids, goals, step).total
        loss.backward()
        assert embeddings.grad is not None
        objective.update(embeddings.detach(), ids, goals)
        losses.append(loss.detach())
        gradients.append(embeddings.grad)
    state = [value.float().flatten() for value in objective.state_dict().values() if value.is_floating_point()]
    parts = {"loss": torch.stack(losses), "gradient": torch.cat([part.flatten() for part in gradients])}
    return parts | ({"state": torch.cat(state)} if state else {})


def engine(setup: Setup) -> Iterator[Row]:
    """Log-sum-exp with and without keys and ids, and the nearest keys."""
    count, dim = setup.pick(4096, 96), setup.pick(128, 16)
    generator = torch.Generator().manual_seed(1)
    rows = normalize(torch.randn(2 * count, dim, generator=generator))
    ids = torch.arange(count) // 2

    def summed(device: torch.device, narrow: bool, symmetric: bool) -> tuple[Tensor, ...]:
        queries = rows[:count].to(device).requires_grad_()
        keys = None if symmetric else rows[count:].to(device, torch.bfloat16 if narrow else torch.float32)
        own = ids.to(device)
        key_ids = None if symmetric else own
        sums = log_sum_exp(queries, keys, 0.1, query_ids=own, key_ids=key_ids)
        sums.square().sum().backward()
        assert queries.grad is not None
        return sums.detach(), queries.grad

    for name, narrow, symmetric in (
        ("all pairs", False, True),
        ("keys", False, False),
        ("keys of 16 bits", True, False),
    ):
        pairs = zip(
            summed(setup.device, narrow, symmetric), summed(torch.device("cpu"), narrow, symmetric), strict=True
        )
        worst = max(error(*pair) for pair in pairs)
        yield agreement(f"log-sum-exp: {name}", worst, SIXTEEN_BITS if narrow else TOLERANCE)
    neighbours = setup.pick(200, 5)
    actual, expected = (
        top_k(rows[:count].to(device), rows[count:].to(device), neighbours) for device in (setup.device, "cpu")
    )
    yield agreement("nearest keys: values", error(actual[0], expected[0]), 1e-5)
    others = float((actual[1].cpu() != expected[1]).double().mean())
    yield agreement("nearest keys: other answers", others, 1e-2, "neighbours that tie to the last bit change places")


def views(setup: Setup) -> Iterator[Row]:
    """Views with every effect, of colour and of grey images."""
    size, count = setup.pick(96, 16), setup.pick(64, 4)
    settings = {
        "num_views": 3,
        "rotation": 15.0,
        "shear": 5.0,
        "blur": 0.5,
        "solarize": 0.2,
        "erase": 0.3,
    }
    generator = torch.Generator().manual_seed(2)
    for channels in (3, 1):
        shape = (count, channels, size, size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        made = ViewsSettings.model_validate(settings).build(size=size, channels=channels, seed=0)
        pictures = Pictures((pixels,))
        (expected,) = made(pictures, torch.arange(count), 1)
        (actual,) = made.to(setup.device)(pictures.to(setup.device), torch.arange(count, device=setup.device), 1)
        name = "colour" if channels == 3 else "grey"
        yield agreement(f"views, {name}: mean difference", float((actual.cpu() - expected).abs().mean()), 1e-3)
