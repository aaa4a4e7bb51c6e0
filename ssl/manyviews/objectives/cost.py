"""What an objective costs on each process, as functions of the sizes: negatives, memory, traffic and arithmetic.

Traffic is what a process receives in a step, forward, backward and update, as `distributed.traffic` counts it: of what
all processes gather, or add up for one of them, a ring brings it all but its own W-th part. Left out is what does not
grow: the agreements on how many images each process has, 8 bytes from every other process, a dozen times at most.

Throughout, anchors are the embeddings of a step that have a loss, over all processes: its views of its images.
"""

from typing import NamedTuple

import torch

from manyviews.objectives import (
    Bank,
    Contrastive,
    InBatch,
    LogRatio,
    Margin,
    MarginSoftmax,
    NearestNeighbours,
    NoiseContrastive,
    NPair,
    Objective,
    Queue,
    Ranking,
    Supervised,
    Triplet,
)
from manyviews.objectives.noise import DENSE
from manyviews.system.plural import plural

NUMBER, ID, STEP = 4, 8, 4
"""Bytes of a float32, of an id, and of the step at which a row was written."""


class Scale(NamedTuple):
    """What a step of an objective costs each process, and what it gets for it."""

    negatives: int
    """Embeddings that each anchor is contrasted with, in one step; where classes are the ids, at most."""
    rows: int
    """Rows of a bank or slots of a queue that a process holds, the most that any of them does."""
    memory: int
    """Bytes that these take, with their ids or steps."""
    traffic: int
    """Bytes that a process receives from the others in a step."""
    products: int
    """Multiplications, each with an addition, in a process's matrix products of a step."""


def scale(settings: Objective, *, images: int, views: int, batch: int, dim: int, processes: int) -> Scale:
    """The cost of an objective by its settings.

    Args:
        settings: the objective's.
        images: how many there are to train on, N; for class weights, how many classes.
        views: of each image in a step.
        batch: images of a step over all processes, B.
        dim: of the embeddings, D.
        processes: W.
    """
    views = 1 if settings.splits_views else views
    if isinstance(settings, Bank):
        return bank(settings, images=images, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, Queue):
        return queue(settings, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, NearestNeighbours):
        return nearest_neighbours(settings, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, NoiseContrastive):
        return noise_contrastive(settings, images=images, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, MarginSoftmax):
        # The margin is a matter of the anchors' own weights, so it costs what the softmax without it does.
        plain = Bank(estimator="parametric")
        return bank(plain, images=images, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, NPair):
        return n_pair(settings, views=views, batch=batch, dim=dim, processes=processes)
    if isinstance(settings, LogRatio | Ranking | Contrastive | Triplet | Margin):
        return all_pairs(settings, views=views, batch=batch, dim=dim, processes=processes)
    return in_batch(settings, views=views, batch=batch, dim=dim, processes=processes)


def in_batch(settings: InBatch | Supervised, *, views: int, batch: int, dim: int, processes: int) -> Scale:
    """Every image of the batch against every other, each pair once: it keeps nothing.

    A bilinear score is not symmetric: each pair is then two, and the matrix has products of its own.
    """
    anchors = views * batch
    sums = 2 if isinstance(settings, InBatch) and settings.hardness else 1
    if isinstance(settings, InBatch) and settings.score == "bilinear":
        # In backward the sums' gradients go to all keys, whose own gradient stays.
        traffic = sums * (_softmax_traffic(anchors, dim) + anchors * NUMBER) + batch * ID
        products = sums * 4 * anchors**2 * dim + 3 * anchors * dim**2
        return Scale(views * (batch - 1), 0, 0, _received(traffic, processes), products // processes)
    # Forward: ids and embeddings to all, the sums to all. Backward: the sums' gradients to all, the embeddings' home.
    traffic = sums * anchors * (ID + 2 * NUMBER * dim + 3 * NUMBER)
    # Ids tell how many negatives there are. With classes, their sums travel too: one row for each id of a process.
    traffic += batch * (2 * ID + 2 * NUMBER * dim) if isinstance(settings, Supervised) else batch * ID
    # A pair's product serves two anchors. In backward it is made again, and gives each of them the other's row.
    products = sums * 2 * anchors**2 * dim // processes
    return Scale(views * (batch - 1), 0, 0, _received(traffic, processes), products)


def queue(settings: Queue, *, views: int, batch: int, dim: int, processes: int) -> Scale:
    """Every anchor against every key of the queue, which is spread over the processes."""
    anchors, size = views * batch, settings.size * (processes if settings.per_process else 1)
    number = _bytes(settings.storage)
    rows = -(-size // processes)
    # Of what a step enqueues, keys and ids go to all.
    traffic = _softmax_traffic(anchors, dim) + batch * (ID + number * dim)
    return Scale(
        size, rows, rows * (number * dim + ID), _received(traffic, processes), 2 * anchors * size * dim // processes
    )


def nearest_neighbours(settings: NearestNeighbours, *, views: int, batch: int, dim: int, processes: int) -> Scale:
    """Every image's neighbour in the support set, which is spread over the processes, against the batch."""
    queries, pairs, rows = views * batch, views * (views - 1), -(-settings.size // processes)
    # All rows are asked for the nearest; every process names its own, and the nearest of all comes home with its id.
    traffic = queries * (2 * NUMBER * dim + processes * NUMBER + ID)
    # Neighbours go to the predictions of all, for each pair of views, and in backward the losses' gradients.
    traffic += pairs * batch * (ID + NUMBER * dim + 3 * NUMBER)
    # Ids tell how many negatives there are; projections and ids go into the support set.
    traffic += batch * (ID + ID + NUMBER * dim)
    products = queries * settings.size * dim + pairs * 3 * batch**2 * dim
    memory = rows * (NUMBER * dim + ID)
    return Scale(batch - 1, rows, memory, _received(traffic, processes), products // processes)


def bank(settings: Bank, *, images: int, views: int, batch: int, dim: int, processes: int) -> Scale:
    """Every anchor against all rows, or against those drawn; a process holds the rows of its part of the images.

    Not counted, as they are the optimiser's: the gradient of the parametric softmax's weights and its averages.
    """
    anchors, number = views * batch, _bytes(settings.storage)
    rows = -(-images // processes)
    exact, parametric = settings.estimator == "exact", settings.estimator == "parametric"
    # The anchors' own rows come from where they are: ids there, rows back.
    traffic = batch * (ID + number * dim)
    if parametric:
        # In backward the losses' gradients go to all weights, and those of the anchors' own weights home.
        traffic += _softmax_traffic(anchors, dim) + anchors * NUMBER + batch * NUMBER * dim
        products = 4 * anchors * images * dim
    elif exact:
        traffic += _softmax_traffic(anchors, dim)
        products = 2 * anchors * images * dim
    else:
        traffic += _noise_traffic(settings, anchors, dim)
        products = _noise_products(settings, images, rows, anchors, dim)
    if not parametric:
        # What was seen goes to the rows it belongs to.
        traffic += batch * (ID + NUMBER * dim)
    negatives = images - 1 if exact or parametric else settings.negatives
    memory = rows * (number * dim + (0 if parametric else STEP))
    return Scale(negatives, rows, memory, _received(traffic, processes), products // processes)


def noise_contrastive(
    settings: NoiseContrastive, *, images: int, views: int, batch: int, dim: int, processes: int
) -> Scale:
    """Every anchor against the noise; its rows are taken to be all different and evenly spread.

    One draw for all goes to all processes; with one for each anchor a process gets those of its own anchors.
    """
    anchors, rows, noise = views * batch, -(-images // processes), min(settings.count, images)
    if not settings.one_draw:
        noise = min(settings.count * -(-anchors // processes), images)
        # The products are with the noise of all anchors of a process.
        traffic = batch * (ID + 2 * NUMBER * dim) + processes * noise * (ID + 2 * NUMBER * dim)
        products = 3 * anchors * noise * dim
        return Scale(settings.count, rows, rows * NUMBER * dim, _received(traffic, processes), products // processes)
    # Ids go to the anchors' own rows, and these back; then all noise rows go to all. In backward come the gradients.
    traffic = batch * (ID + 2 * NUMBER * dim) + 2 * processes * -(-noise // processes) * NUMBER * dim
    products = 3 * anchors * noise * dim
    return Scale(settings.count, rows, rows * NUMBER * dim, _received(traffic, processes), products // processes)


def n_pair(settings: NPair, *, views: int, batch: int, dim: int, processes: int) -> Scale:
    """The first of each pair against the second of all: pairs of views, or of one view of two images of a class."""
    pairs, of_an_id = (views // 2 * batch, views // 2) if views > 1 else (batch // 2, 1)
    ways = 2 if settings.symmetric else 1
    traffic, products = _gathered_traffic(views, batch, dim), ways * 3 * pairs**2 * dim
    if settings.form == "multi_class":
        # The softmax by itself; in backward its sums' gradients go to all keys, whose own gradient stays.
        traffic += ways * pairs * NUMBER + ways * _softmax_traffic(pairs, dim)
        products = ways * 4 * pairs**2 * dim
    return Scale(pairs - of_an_id, 0, 0, _received(traffic, processes), products // processes)


def all_pairs(
    settings: LogRatio | Ranking | Contrastive | Triplet | Margin, *, views: int, batch: int, dim: int, processes: int
) -> Scale:
    """Every embedding against all of the batch, each process for its own; the distances of labels are not counted.

    The products are those of a GPU: on a CPU the gradient of a few sampled pairs takes none, which leaves a third.
    """
    anchors = views * batch
    # Squared distances are products of longer rows.
    spherical = (
        settings.normalized if isinstance(settings, Contrastive | Triplet) else not isinstance(settings, LogRatio)
    )
    width = dim if spherical else dim + 2
    # Pairs within the margin are counted before they are weighed.
    counted = isinstance(settings, Contrastive) and (settings.average == "active" or settings.sampling.name == "all")
    passes = 4 if counted else 3
    traffic = _gathered_traffic(views, batch, dim)
    return Scale(views * (batch - 1), 0, 0, _received(traffic, processes), passes * anchors**2 * width // processes)


def in_words(found: Scale) -> str:
    """A line about it, as the log has it."""
    parts = [f"{found.negatives:,} per anchor"]
    if found.rows:
        parts.append(f"{plural(found.rows, 'row')} on each process ({amount(found.memory)})")
    if found.traffic:
        parts.append(f"{amount(found.traffic)} received by each process per step")
    return ", ".join(parts)


def amount(count: int) -> str:
    """Bytes as a person writes them: 7 bytes, 15.5 MB, 266 kB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    number = count / 1000**power
    return f"{number:,.{0 if number >= 100 else 1}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _softmax_traffic(anchors: int, dim: int) -> int:
    """Anchors and their ids go to all rows, the sums to all processes, and the weighted rows home."""
    return anchors * (ID + NUMBER * dim + 2 * NUMBER + NUMBER * dim)


def _gathered_traffic(views: int, batch: int, dim: int) -> int:
    """Embeddings and the ids of images go to all, and the embeddings' gradients home."""
    return batch * ID + views * batch * 2 * NUMBER * dim


def _noise_traffic(settings: Bank, anchors: int, dim: int) -> int:
    """Anchors and their ids go to the noise rows; maxima and sums, and the weighted rows, come home."""
    there, home = anchors * (ID + NUMBER * dim), anchors * NUMBER * dim
    logarithm = there + anchors * 3 * NUMBER
    if settings.estimator == "infonce":
        return logarithm + home
    # The log-sum over the noise, without gradient, is what the information is bounded by.
    loss = there + anchors * NUMBER + home + logarithm
    averaged = anchors * NUMBER
    if settings.normaliser == "exact":
        # Over all rows without exception, and without gradient: neither ids travel, nor rows.
        return loss + averaged + _softmax_traffic(anchors, dim) - anchors * ID - home
    return loss + (averaged if settings.normaliser == "ema" else 0)


def _noise_products(settings: Bank, images: int, rows: int, anchors: int, dim: int) -> int:
    """Scores of the noise rows and their weighted mean; with NCE the scores twice, for their log-sum comes first."""
    # With noise for each image, products with all rows may cost less time than gathering the few.
    dense = not settings.shared and rows <= DENSE * settings.negatives
    scores = anchors * (images if dense else settings.negatives) * dim
    if settings.estimator == "nce" and settings.normaliser == "exact":
        return 3 * scores + anchors * images * dim
    return scores * (3 if settings.estimator == "nce" else 2)


def _received(whole: int, processes: int) -> int:
    return whole * (processes - 1) // processes


def _bytes(storage: str) -> int:
    number: torch.dtype = getattr(torch, storage)
    return number.itemsize
