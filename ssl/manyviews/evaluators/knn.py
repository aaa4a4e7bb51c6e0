"""Weighted nearest neighbours (Wu et al. 2018, section 3.4): the features as they are, nothing is trained."""

from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.data import sample_ids
from manyviews.engine import top_k
from manyviews.engine.rows import slices
from manyviews.engine.threads import on_all_cores
from manyviews.evaluators.distance import Nearness, searchable
from manyviews.evaluators.splits import Prediction, hold_out, hold_out_some, num_classes

MOST_HELD_OUT = 10_000
"""Training images held out for the choice: more would make it dearer, and hardly better."""
SCORES = 1 << 17
"""Scores of queries and classes held at once by a core: 1 MiB, so that all votes of a query are counted in a cache."""


class KnnSettings(Settings):
    """The grid of which the best pair on held-out training images is used."""

    neighbours: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (1, 5, 10, 20, 50, 100, 200), min_length=1, max_length=64
    )
    """Numbers of neighbours that vote; Wu et al. 2018 take 200, DINO reports the best of 10, 20, 100 and 200."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=1e4)], ...] = Field(
        (0.02, 0.07, 0.2), min_length=1, max_length=64
    )
    """Temperatures of a vote's weight, exp(cosine / temperature); the usual one is 0.07."""


def weighted_vote(
    similarities: Float[Tensor, "queries k"],
    labels: Int[Tensor, "queries k"],
    temperature: float,
    classes: int,
) -> Float[Tensor, "queries classes"]:
    """The score of each class: the sum of exp(similarity / temperature) over the neighbours that have it.

    float64. A number may be taken from all similarities of a query, so that nothing overflows: no choice depends on it.
    """
    weights = (similarities.double() / temperature).exp_()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def predict(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "bank dim"],
    labels: Int[Tensor, " bank"],
    *,
    neighbours: tuple[int, ...],
    temperatures: tuple[float, ...],
    classes: int,
    query_ids: Int[Tensor, " queries"] | None = None,
    bank_ids: Int[Tensor, " bank"] | None = None,
    nearness: Nearness = "cosine",
    shared: bool = False,
) -> Int[Tensor, "neighbours temperatures queries"]:
    """The predicted class of every query for every pair of a grid, from one search for the most neighbours.

    A vote weighs exp(similarity / temperature): of the cosine, for which features are normalised here, or of their
    Euclidean distance, as `distance.searchable` defines its similarity. A number of neighbours above the size of the
    bank means the whole bank. Rows of the bank labelled −1 are left out, and so are those with the query's id where ids
    are given. Equal scores go to the lowest class, equal similarities to the lowest row. With `shared` all processes,
    which hold the same, come together: each searches its share of the bank, and all get the whole answer.

    Raises:
        ValueError: if the queries are the bank and no ids are given: each would find itself.
    """
    if query_ids is None and queries.shape == bank.shape and torch.equal(queries, bank):
        raise ValueError("the queries are the bank, so each would find itself; give query_ids and bank_ids")
    labelled = labels >= 0
    if not labelled.all():
        bank, labels = bank[labelled], labels[labelled]
        bank_ids = bank_ids[labelled] if bank_ids is not None else None
    if not len(bank):
        raise ValueError("the bank holds no labelled image")
    most = min(max(neighbours), len(bank))
    cosine = nearness == "cosine"
    left, right = (queries, bank) if cosine else searchable(queries, bank, nearness)
    similarities, places = top_k(left, right, most, query_ids=query_ids, key_ids=bank_ids, cosine=cosine, shared=shared)
    found = labels[places]
    chosen = torch.empty(len(neighbours), len(temperatures), len(queries), dtype=torch.int64)
    # Votes add up: going from fewer to more neighbours, each neighbour is counted once per temperature.
    ascending = sorted(range(len(neighbours)), key=lambda place: neighbours[place])

    def vote(rows: slice) -> None:
        nearest = similarities[rows, :1]
        relative = similarities[rows] - nearest.masked_fill(nearest.isinf(), 0)
        for column, temperature in enumerate(temperatures):
            scores, counted = relative.new_zeros(len(relative), classes, dtype=torch.float64), 0
            for place in ascending:
                segment = slice(counted, min(neighbours[place], most))
                scores += weighted_vote(relative[:, segment], found[rows, segment], temperature, classes)
                chosen[place, column, rows] = scores.argmax(1)
                counted = segment.stop

    at_once = SCORES if similarities.device.type == "cpu" else 128 * SCORES
    parts = slices(0, len(queries), max(1, at_once // max(classes, most)))
    on_all_cores([partial(vote, rows) for rows in parts], similarities.device)
    return chosen


def knn(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    classes: int,
    settings: KnnSettings,
    *,
    share: float = 0.2,
    seed: int = 0,
    most: int = MOST_HELD_OUT,
    nearness: Nearness = "cosine",
    shared: bool = False,
) -> Prediction:
    """Predicts the test images from all training images, with the pair chosen on a held-out part of these.

    The test labels are no argument. Equal validation accuracies go to the pair that the grid names first.

    Args:
        train: features of the training images.
        train_labels: their classes; −1: unlabelled, left out.
        test: features of the test images.
        classes: number of classes in both.
        settings: the grid.
        share: part of each class that is held out for the choice.
        seed: of the draw of that part.
        most: at most so many images are held out.
        nearness: cosine, or Euclidean distance of the features as they are.
        shared: all processes, which hold the same, search together: see `predict`.

    Raises:
        ValueError: if the test images are the training images.
    """
    if train.shape == test.shape and torch.equal(train, test):
        raise ValueError(
            "the held-out images are the images to learn from, of which each would find itself; name others by "
            "data.test=FOLDER"
        )
    kept, held = hold_out_some(train_labels, share=share, seed=seed, most=most)
    grid = settings.neighbours, settings.temperatures
    # Where no class has a second image to hold out, the first pair of the grid: of one vote for each class the nearest
    # decides, whatever the pair.
    best, validation = 0, None
    if len(held):
        guesses = predict(
            train[held],
            train[kept],
            train_labels[kept],
            neighbours=grid[0],
            temperatures=grid[1],
            classes=classes,
            query_ids=held,
            bank_ids=kept,
            nearness=nearness,
            shared=shared,
        )
        hits = (guesses == train_labels[held]).sum(2).flatten()
        best = int(hits.argmax())
        validation = hits[best].item() / len(held)
    k, temperature = grid[0][best // len(grid[1])], grid[1][best % len(grid[1])]
    predictions = predict(
        test,
        train,
        train_labels,
        neighbours=(k,),
        temperatures=(temperature,),
        classes=classes,
        nearness=nearness,
        shared=shared,
    )
    # The bank of the final vote may be smaller than the k that was asked for.
    k = min(k, int((train_labels >= 0).sum()))
    return Prediction(predictions[0, 0], {"neighbours": k, "temperature": temperature}, validation)


def monitor_knn(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    *,
    seed: int = 0,
    neighbours: int = 20,
    temperature: float = 0.07,
    most: int = 5_000,
) -> float:
    """A cheap look at a run: the kNN accuracy of a tenth of the training images, found among the others.

    At most `most` labelled images, chosen by the seed, take part. The default k and temperature are DINO's usual ones;
    nothing is chosen here, so the number is comparable along a run and between runs with equal settings.
    """
    labelled = (labels >= 0).nonzero().squeeze(1)
    labelled = labelled[sample_ids(len(labelled), most, seed=seed)]
    features, labels = features[labelled], labels[labelled]
    kept, held = hold_out(labels, share=0.1, seed=seed)
    guesses = predict(
        features[held],
        features[kept],
        labels[kept],
        neighbours=(neighbours,),
        temperatures=(temperature,),
        classes=num_classes(labels),
        query_ids=held,
        bank_ids=kept,
    )
    return (guesses[0, 0] == labels[held]).double().mean().item()
