"""Batch sampler of relations: batches of whole lists, each a query and its items."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from manyviews.data.relations import RelationTable
from manyviews.data.sampler import Order
from manyviews.system.keyed_random import numpy_generator
from manyviews.system.plural import plural

MOST_ITEMS = 15
"""Items of a ranked list in a batch, unless more are asked for."""
LISTS = {"pairs": "pair", "triplets": "triplet", "ranked": "ranked list"}


def list_size(relations: RelationTable, items: int | None = None) -> int:
    """Number of images of a list in a batch: 2 for pairs, 3 for triplets, 1 and `items` for ranked lists.

    By default a ranked list has as many items as the longest one, and at most 15.
    """
    if relations.kind != "ranked":
        return relations.ids.shape[1]
    longest = int(relations.ids[:, 0].unique(return_counts=True)[1].max())
    return 1 + (min(longest, MOST_ITEMS) if items is None else items)


class RelationOrder(Order):
    """Batch sampler of lists of `size` images: a query, then its items; an epoch is a pass over the relations.

    Each pair, triplet or ranked list comes once in an epoch; the rest that fills no batch, another one in each epoch,
    is dropped. Which image of a pair is the query changes from epoch to epoch. A longer ranked list has other items in
    each epoch, one of the most relevant among them and, if there are any, a less relevant one. A shorter one is filled
    up with its query. The ranks' shares of a batch are whole lists.

    `unrelated` of the images of a batch are drawn from `others`, ids of images in no relation, and stand between the
    lists in groups of `size`: each comes once before one comes again.

    Raises:
        ValueError: the batch, or the unrelated images of it, are not a multiple of `size` for each process, or there
            are too few relations or unrelated images for one.

    Examples:
        >>> triplets = RelationTable("triplets", torch.tensor([[0, 1, 2], [3, 2, 0]]), torch.ones(2))
        >>> RelationOrder(triplets, 3, batch_size=6, seed=0).batch(0)[1].view(2, 3).tolist()
        [[0, 1, 2], [3, 2, 0]]
    """

    def __init__(
        self,
        relations: RelationTable,
        size: int,
        batch_size: int,
        seed: int,
        *,
        processes: int = 1,
        others: Int64[Tensor, " others"] | None = None,
        unrelated: int = 0,
    ) -> None:
        self._rows, self._numbers = relations.ids.numpy(), relations.numbers.numpy()
        self._queries, self._owners = np.unique(self._rows[:, 0], return_inverse=True)
        self.kind, self.size = relations.kind, size
        self.lists = len(self._queries) if self.kind == "ranked" else len(self._rows)
        whole, name = size * processes, LISTS[self.kind]
        if batch_size % whole or batch_size < whole:
            on_each = f", on each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"train.batch_size={batch_size} does not hold whole lists of {size} images, which a {name} takes"
                f"{on_each}; use {max(round(batch_size / whole), 1) * whole}"
            )
        if unrelated % whole or unrelated >= batch_size:
            most = batch_size - whole
            raise ValueError(
                f"train.unrelated={unrelated} must leave room for lists in a batch of {batch_size} images, and be a "
                f"multiple of {whole}, as they are; use {min(max(round(unrelated / whole), 1) * whole, most)}"
            )
        self._others, self.unrelated = torch.empty(0, dtype=torch.int64) if others is None else others, unrelated
        if len(self._others) < unrelated:
            raise ValueError(
                f"train.unrelated={unrelated}, and {plural(len(self._others), 'image')} of all are in no relation; use "
                f"{len(self._others) // whole * whole}"
            )
        self.per_batch = (batch_size - unrelated) // size
        if self.lists < self.per_batch:
            most = self.lists // processes * whole + unrelated
            way_out = f"use train.batch_size={most}, or give more relations"
            raise ValueError(
                f"{plural(self.lists, name)} are fewer than the {self.per_batch} in a batch of {batch_size} "
                f"images; {way_out if most > unrelated else 'give more relations, or start fewer processes'}"
            )
        super().__init__(batch_size, batch_size, seed)
        self.steps_per_epoch = self.lists // self.per_batch
        self.images_per_epoch = self.steps_per_epoch * batch_size

    def _arrange(self, epoch: int) -> Int64[Tensor, " images"]:
        generator = numpy_generator("relations", self.seed, epoch)
        steps = self.steps_per_epoch
        shuffled = generator.permutation(self.lists)[: steps * self.per_batch]
        lists = self._rows
        if self.kind == "pairs":
            lists = np.where(generator.random((self.lists, 1)) < 0.5, lists, lists[:, ::-1])
        elif self.kind == "ranked":
            lists = self._drawn(generator)
        batches = lists[shuffled].reshape(steps, self.per_batch, self.size)
        if self.unrelated:
            groups = self.unrelated // self.size
            drawn = np.resize(generator.permutation(self._others.numpy()), (steps, groups, self.size))
            # Evenly among the lists, so that each rank gets as many.
            places = (np.arange(groups) * (self.per_batch + groups)) // groups
            batches = np.insert(batches, places - np.arange(groups), drawn, axis=1)
        return torch.from_numpy(batches.ravel())

    def _drawn(self, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Lists of the queries and items drawn for them."""
        owners = self._owners
        keys = generator.random(len(owners))
        best = np.zeros(self.lists)
        np.maximum.at(best, owners, self._numbers)
        most_relevant = self._numbers == best[owners]
        # The first of either kind comes before all others.
        for kind, priority in ((most_relevant, -2.0), (~most_relevant, -1.0)):
            rows = np.flatnonzero(kind)
            rows = rows[np.lexsort((keys[rows], owners[rows]))]
            keys[rows[np.unique(owners[rows], return_index=True)[1]]] = priority
        rows = np.lexsort((keys, owners))
        ranks = np.arange(len(rows)) - np.searchsorted(owners[rows], owners[rows])
        kept = ranks < self.size - 1
        rows, ranks = rows[kept], ranks[kept]
        lists = np.repeat(self._queries[:, None], self.size, axis=1)
        lists[owners[rows], 1 + ranks] = self._rows[rows, 1]
        return lists
