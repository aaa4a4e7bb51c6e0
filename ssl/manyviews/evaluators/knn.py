"""Weighted nearest neighbours (Wu et al. 2018, section 3.4); nothing is trained."""

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
from manyviews.evaluators.splits import Prediction, hold_out, num_classes

MOST_HELD_OUT = 10_000
"""Training images held out for the choice: more would cost more and choose hardly better."""
SCORES = 1 << 17
"""Scores of queries and classes held at once by a core: 1 MiB, to count all votes of a query in a cache."""


class KnnSettings(Settings):
    """The grid of pairs; the best one on held-out training images is used."""

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
    """Sums exp(similarity / temperature) over the neighbours of each class, in float64.

    Subtract a constant from all similarities of a query to avoid overflow: the largest score stays the largest.

    Examples:
        >>> weighted_vote(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]), 0.07, 2).tolist()
        [[1.0, 2.0]]
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
    """Predicts the class of every query for every pair of a grid, from one search.

    A vote weighs exp(similarity / temperature), with the cosine or the similarity of `distance.searchable`. More
    neighbours than the bank has rows mean the whole bank. Rows of the bank labelled −1 are left out, as are those with
    the query's id. Equal scores go to the lowest class, equal similarities to the lowest row. With `shared`,
    collective: all ranks pass the same, each searches its share of the bank, and all get the whole result. All is
    computed where the queries are.

    Raises:
        ValueError: if the queries are the bank and no ids are given: each would be its own nearest neighbour.
    """
    if query_ids is None and queries.shape == bank.shape and torch.equal(queries, bank.to(queries.device)):
        raise ValueError("the queries are the bank, so each would find itself; give query_ids and bank_ids")
    labelled = labels >= 0
    if not labelled.all():
        bank, labels = bank[labelled], labels[labelled]
        bank_ids = bank_ids[labelled] if bank_ids is not None else None
    if not len(bank):
        raise ValueError("the bank has no labelled image")
    most, device = min(max(neighbours), len(bank)), queries.device
    cosine = nearness == "cosine"
    left, right = (queries, bank) if cosine else searchable(queries, bank, nearness)
    similarities, rows = top_k(left, right, most, query_ids=query_ids, key_ids=bank_ids, cosine=cosine, shared=shared)
    votes = labels.to(device)[rows]
    predictions = torch.empty(len(neighbours), len(temperatures), len(queries), dtype=torch.int64, device=device)
    # Votes add up: going from fewer to more neighbours, each neighbour is counted once per temperature.
    ascending = sorted(range(len(neighbours)), key=neighbours.__getitem__)

    def vote(part: slice) -> None:
        nearest = similarities[part, :1]
        relative = similarities[part] - nearest.masked_fill(nearest.isinf(), 0)
        for column, temperature in enumerate(temperatures):
            scores, counted = relative.new_zeros(len(relative), classes, dtype=torch.float64), 0
            for index in ascending:
                segment = slice(counted, min(neighbours[index], most))
                scores += weighted_vote(relative[:, segment], votes[part, segment], temperature, classes)
                predictions[index, column, part] = scores.argmax(1)
                counted = segment.stop

    at_once = SCORES if similarities.device.type == "cpu" else 128 * SCORES
    parts = slices(0, len(queries), max(1, at_once // max(classes, most)))
    on_all_cores([partial(vote, part) for part in parts], similarities.device)
    return predictions


def knn(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    classes: int,
    settings: KnnSettings,
    *,
    share: float = 0.2,
    seed: int = 0,
    nearness: Nearness = "cosine",
    shared: bool = False,
) -> Prediction:
    """Predicts the test images, with k and temperature chosen on held-out training images.

    `share` of each class is held out, at most 10,000 images; equal validation accuracies go to the pair that the grid
    names first. Training images labelled −1 are left out. `shared` is that of `predict`. All is computed where the
    test features are; the predictions are on the CPU.

    Raises:
        ValueError: if the test images are the training images.
    """
    if train.shape == test.shape and torch.equal(train.to(test.device), test):
        raise ValueError(
            "the held-out images are the training images, so each would be its own nearest neighbour; name others with "
            "data.test=FOLDER"
        )
    vote = partial(predict, classes=classes, nearness=nearness, shared=shared)
    kept, held = hold_out(train_labels, share=share, seed=seed, most=MOST_HELD_OUT, one_each=True)
    grid = [(k, temperature) for k in settings.neighbours for temperature in settings.temperatures]
    # If no class has a second image to hold out, the first pair: with one vote for each class the nearest decides.
    best, validation = 0, None
    if len(held):
        guesses = vote(
            train[held].to(test.device),
            train[kept],
            train_labels[kept],
            neighbours=settings.neighbours,
            temperatures=settings.temperatures,
            query_ids=held,
            bank_ids=kept,
        )
        hits = (guesses.cpu() == train_labels[held]).sum(2).flatten()
        best = int(hits.argmax())
        validation = hits[best].item() / len(held)
    k, temperature = grid[best]
    predictions = vote(test, train, train_labels, neighbours=(k,), temperatures=(temperature,))
    # The bank may be smaller than k.
    k = min(k, int((train_labels >= 0).sum()))
    return Prediction(predictions[0, 0].cpu(), {"neighbours": k, "temperature": temperature}, validation)


def monitor_knn(
    features: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], *, seed: int = 0, most: int = 5_000
) -> float:
    """Computes the kNN accuracy of a tenth of the images among the others, to watch a run.

    At most `most` labelled images, sampled with `seed`, take part. k = 20 and temperature 0.07 are DINO's usual ones;
    nothing is chosen here, so values are comparable along a run and between runs with equal settings.
    """
    labelled = (labels >= 0).nonzero().squeeze(1)
    labelled = labelled[sample_ids(len(labelled), most, seed=seed)]
    features, labels = features[labelled], labels[labelled]
    kept, held = hold_out(labels, share=0.1, seed=seed)
    guesses = predict(
        features[held],
        features[kept],
        labels[kept],
        neighbours=(20,),
        temperatures=(0.07,),
        classes=num_classes(labels),
        query_ids=held,
        bank_ids=kept,
    )
    return (guesses[0, 0].cpu() == labels[held]).double().mean().item()
