"""Few-shot classification: which of N classes, each known by K images, is an image of?"""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Int64
from pydantic import BeforeValidator, Field
from torch import Tensor

from manyviews.config import Settings, as_list
from manyviews.evaluators.distance import Nearness
from manyviews.evaluators.results.intervals import student_interval
from manyviews.evaluators.results.measurement import Measurement
from manyviews.system import keyed_random
from manyviews.system.plural import plural

HELD = 1 << 23
"""Numbers of gathered features held at once: 32 MiB. It changes no result."""
Ways = Annotated[int, Field(ge=2, le=10_000)]
Shots = Annotated[int, Field(ge=1, le=1_000)]


class FewShotSettings(Settings):
    """The episodes of few-shot classification."""

    ways: Annotated[tuple[Ways, ...], BeforeValidator(as_list)] = Field((5,), min_length=1, max_length=64)
    """Numbers N of classes in an episode: 5 and 20 in papers."""
    shots: Annotated[tuple[Shots, ...], BeforeValidator(as_list)] = Field((1, 5), min_length=1, max_length=64)
    """Numbers K of example images of each class; each is measured with each number of ways."""
    queries: int = Field(15, ge=1, le=1_000)
    """Other images of each class that are classified, at most; 15 in Snell et al. 2017, 1 in Koch et al. 2015."""
    episodes: int = Field(1_000, ge=2, le=1_000_000)
    """Episodes, each of classes and images of its own; papers take 400 to 10,000."""


class Episodes(NamedTuple):
    """Classes and images of episodes, by their positions in the features."""

    examples: Int64[Tensor, "episodes ways shots"]
    queries: Int64[Tensor, "episodes ways queries"]
    asked: Bool[Tensor, "episodes ways queries"]
    """Whether a query is one; classes of few images have fewer."""


def classes_of(labels: Int[Tensor, " images"], shots: int) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " classes"]]:
    """Returns images in the order of their classes, and sizes of the classes with more than `shots` images.

    Images labelled −1 are left out, and those of the other classes.
    """
    order = labels.argsort(stable=True)
    order = order[labels[order] >= 0]
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    kept = sizes > shots
    return order[kept.repeat_interleave(sizes)], sizes[kept]


def refuse_episodes(labels: Int[Tensor, " images"], settings: FewShotSettings) -> None:
    """Raises ValueError if there are fewer classes with enough images than ways."""
    for shots in settings.shots:
        classes = len(classes_of(labels, shots)[1])
        if classes < (ways := max(settings.ways)):
            raise ValueError(
                f"{ways}-way {shots}-shot episodes take {ways} classes of {shots + 1} images or more, and of the "
                f"images to be compared {plural(classes, 'class has', 'classes have')} as many; use smaller "
                "protocol.few_shot.ways or shots, or name more classes"
            )


def draw_episodes(
    labels: Int[Tensor, " images"], ways: int, shots: int, settings: FewShotSettings | None = None, *, seed: int = 0
) -> Episodes:
    """Draws classes, examples and queries, each uniformly and without replacement within an episode.

    A class with fewer than shots + queries images is asked all but its examples; one with no image left for a query is
    left out, as are images labelled −1. A pure function of labels, ways, shots, queries and seed: episode i is the same
    however many there are.

    Raises:
        ValueError: if there are fewer such classes than ways.

    Examples:
        >>> episodes = draw_episodes(torch.arange(40) % 8, ways=5, shots=1)
        >>> episodes.examples.shape, episodes.queries.shape, int(episodes.asked[0].sum())
        (torch.Size([1000, 5, 1]), torch.Size([1000, 5, 15]), 20)
    """
    settings = settings or FewShotSettings()
    refuse_episodes(labels, settings.model_copy(update={"ways": (ways,), "shots": (shots,)}))
    order, sizes = classes_of(labels.cpu(), shots)
    key = seed, ways, shots, settings.queries
    rows = torch.arange(settings.episodes)[:, None]
    classes, _ = _distinct(torch.full((settings.episodes,), len(sizes)), ways, rows, *key, 1)
    slots = rows * ways + torch.arange(ways)
    within, drawn = _distinct(sizes[classes], shots + settings.queries, slots[..., None], *key, 2)
    images = order[(sizes.cumsum(0) - sizes)[classes][..., None] + within]
    return Episodes(images[..., :shots], images[..., shots:], drawn[..., shots:])


def _distinct(
    sizes: Int64[Tensor, "*shape"], most: int, rows: Int64[Tensor, "*shape 1"], *key: int
) -> tuple[Int64[Tensor, "*shape most"], Bool[Tensor, "*shape most"]]:
    """Draws distinct integers below each size, in random order, all of them if there are at most `most`.

    Returns them, and which there are: those of a small size are filled up with zeros. Floyd's algorithm (Bentley and
    Floyd 1987), which needs no list of all integers.
    """
    steps = torch.arange(most)
    counts = sizes.clamp(max=most)[..., None]
    indices = rows * most + steps
    uniforms = keyed_random.uniform(indices, *key, 0).double()
    drawn = torch.full((*sizes.shape, most), -1)
    for step in range(most):
        last = (sizes - counts[..., 0] + step)[..., None]
        value = torch.minimum((uniforms[..., step : step + 1] * (last + 1)).long(), last)
        drawn[..., step : step + 1] = torch.where((drawn == value).any(-1, keepdim=True), last, value)
    present = steps < counts
    # Those drawn first are smaller.
    order = torch.where(present, keyed_random.uniform(indices, *key, 1), 2.0).argsort(dim=-1, stable=True)
    return drawn.gather(-1, order).masked_fill_(~present, 0), present


@torch.no_grad()
def classify_episodes(
    features: Float[Tensor, "images dim"], episodes: Episodes, *, nearness: Nearness = "cosine"
) -> Bool[Tensor, "episodes ways queries"]:
    """Returns which queries are nearest to their own class; those that are none are not.

    A query q belongs to the class whose prototype cₖ, the mean of its K examples, is nearest to it (Snell et al. 2017,
    equations 1 and 2): argmaxₖ cos(q, cₖ) of the mean of unit features, or argminₖ ‖q − cₖ‖. With one example it is the
    class of the most similar example, as Siamese networks are measured (Koch et al. 2015, section 4.3). Computed where
    the features are; the result is on the CPU.

    Examples:
        >>> features = torch.eye(5).repeat(4, 1)
        >>> episodes = draw_episodes(torch.arange(20) % 5, ways=5, shots=1)
        >>> torch.equal(classify_episodes(features, episodes), episodes.asked)
        True
    """
    features = F.normalize(features, dim=1, eps=1e-6) if nearness == "cosine" else features - features.mean(0)
    return torch.cat([right.cpu() for right in _classified(features, episodes, nearness)])


def _classified(features: Tensor, episodes: Episodes, nearness: Nearness) -> Iterator[Bool[Tensor, "part _ _"]]:
    _, ways, queries = episodes.queries.shape
    at_once = max(1, HELD // (ways * (queries + episodes.examples.shape[2]) * features.shape[1]))
    truth = torch.arange(ways, device=features.device)[:, None]
    for parts in zip(*(tensor.split(at_once) for tensor in episodes), strict=True):
        examples, asking, asked = (part.to(features.device) for part in parts)
        prototypes = features[examples].mean(2)
        if nearness == "cosine":
            prototypes = F.normalize(prototypes, dim=2, eps=1e-6)
        scores = features[asking].flatten(1, 2) @ prototypes.transpose(1, 2)
        if nearness == "euclidean":
            # ‖q − c‖² less what is equal for all classes.
            scores = 2 * scores - prototypes.square().sum(2)[:, None]
        yield (scores.argmax(2).view_as(asking) == truth) & asked


def accuracies(right: Bool[Tensor, "episodes ways queries"], episodes: Episodes) -> Float64[Tensor, " episodes"]:
    """Computes the share of right queries of each episode."""
    return right.sum((1, 2)).double() / episodes.asked.sum((1, 2))


def measure_episodes(
    kind: str,
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    settings: FewShotSettings,
    *,
    nearness: Nearness,
    distance: str,
    seed: int,
) -> tuple[tuple[Measurement, ...], Float64[Tensor, "2 images"]]:
    """Measures every number of ways and shots; returns each image's share of the first's accuracy too.

    All kinds of features are measured by the same episodes. The second row is what an image adds if it is always right:
    episodes share images, so that kinds are compared over images and not over episodes.
    """
    measurements: list[Measurement] = []
    shares: Tensor | None = None
    total = len(classes_of(labels, 0)[1])
    for ways in settings.ways:
        for shots in settings.shots:
            episodes = draw_episodes(labels, ways, shots, settings, seed=seed)
            right = classify_episodes(features, episodes, nearness=nearness)
            values = accuracies(right, episodes)
            if shares is None:
                weights = (episodes.asked / (len(values) * episodes.asked.sum((1, 2), keepdim=True))).double()
                shares = torch.zeros(2, len(features), dtype=torch.float64)
                for row, added in zip(shares, (weights * right, weights), strict=True):
                    row.index_add_(0, episodes.queries.flatten(), added.flatten())
            classes = len(classes_of(labels, shots)[1])
            measurements.append(
                Measurement(
                    "few_shot",
                    kind,
                    f"{ways}-way {shots}-shot",
                    values.mean().item(),
                    *student_interval(values),
                    n=len(values),
                    deviation=values.std().item(),
                    dim=features.shape[1],
                    distance=distance,
                    details={"queries": settings.queries, "classes": classes, "left_out": total - classes},
                )
            )
    assert shares is not None
    return tuple(measurements), shares
