"""Queue of negatives: the momentum twin's embeddings of the images of the last steps."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import at_least_float32, distinct, sum_of_groups
from manyviews.objectives.cost import ID, Cost, Sizes, softmax_traffic
from manyviews.objectives.losses import average, float32_island, information, softmax_cross_entropy
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Taken, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.objectives.sharded_rows import Ring, Storage
from manyviews.system import distributed


class Queue(ObjectiveSettings):
    """MoCo (He et al. 2020, algorithm 1) with the second version's defaults (Chen et al. 2020).

    The negatives of each anchor are the keys in the queue, which is sharded over the ranks; with `per_process` they
    grow with the ranks. They do not grow with gradient accumulation.

    With `ids=labels` the positives are the image's own key and all keys in the queue of the same label: the supervised
    contrast of Khosla et al. 2020 (equation 2, L_out) over the candidates of MoCo.

    Examples:
        >>> Queue(size=4).build(dim=2, population=Population(torch.arange(8)), seed=0).queue.rows.shape
        torch.Size([4, 2])
    """

    name: Literal["queue"] = "queue"
    temperature: Temperature = 0.2
    """Divides the similarities; smaller: harder negatives count more."""
    size: int = Field(65_536, gt=0, le=2**31)
    """Keys in the queue, which are the negatives of each anchor."""
    per_process: bool = False
    """Take the size for each process: with W processes the queue has W times as many keys."""
    storage: Storage = "float32"
    """Number format of the keys; the 16-bit formats halve the memory. Arithmetic is float32 all the same."""
    momentum: float = Field(0.999, ge=0, le=1)
    """Share of its old weights the twin keeps at each step."""
    symmetric: bool = False
    """Contrast view 1 with the twin's view 0 too, and take the mean."""
    shuffle: bool = True
    """With several processes, shuffle the images over them for the twin, so that its batch norms get other batches."""

    @property
    def traits(self) -> Traits:
        """Without symmetry the encoder needs view 0 only, and the twin view 1; local views are the encoder's."""
        return Traits(
            negatives_from="queue",
            fewest_views=2,
            most_views=2,
            twin_momentum=self.momentum,
            bounds_information=True,
            splits_views=not self.symmetric,
            shuffles=self.shuffle,
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every anchor against every key of the queue, which is sharded over the ranks."""
        batch, dim, processes = sizes.batch, sizes.dim, sizes.processes
        # Each local view has the loss of a pair with each of the twin's views.
        local = sizes.views - sizes.compared // batch
        anchors = (2 * (1 + local) if self.symmetric else 1 + local) * batch
        size, number = self.size * (processes if self.per_process else 1), getattr(torch, self.storage).itemsize
        # Of what a step enqueues, keys and ids go to all.
        traffic = softmax_traffic(anchors, dim) + batch * (ID + number * dim)
        products = 2 * anchors * size * dim
        return sizes.cost(size, traffic=traffic, products=products, rows=size, row_bytes=number * dim + ID)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with random unit rows by `seed`, equal on any number of ranks."""
        return QueueObjective(self, dim=dim, population=population, seed=seed)


class QueueObjective(Objective):
    """Loss against a queue; keys of equal ids are positives if several images share an id."""

    def __init__(self, settings: Queue, *, dim: int, population: Population, seed: int) -> None:
        super().__init__()
        self.local = population.keys is not None
        self.settings, self.supervised = settings, population.size < len(population.ids)
        size = settings.size * (distributed.world_size() if settings.per_process else 1)
        self.queue = Ring(size, dim, seed=seed, storage=settings.storage)

    def shards(self) -> dict[str, int]:
        """The queue's rows and ids."""
        return {"queue.rows": self.queue.size, "queue.ids": self.queue.size}

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors against the queue as the last step left it.

        With symmetry `embeddings` and `targets` are both views of the encoder and of the twin, and each view is
        contrasted with the other; without, they are view 0 of the encoder and view 1 of the twin. Local views, further
        ones of the encoder, are contrasted with each view of the twin.

        Raises:
            ValueError: if there are no targets, or another number of views.
        """
        targets = self._checked(embeddings, targets)
        queries, keys = normalize(embeddings), normalize(targets.detach()).flip(0)
        if self.local:
            queries, keys = self._paired(queries, keys)
        positives = (queries * keys).sum(2).flatten()
        anchors, anchor_ids = queries.flatten(0, 1), ids.repeat(len(queries))
        temperature = self.settings.temperature
        if self.supervised:
            sums, counts = key_sums(self.queue, ids)
            sums, counts = sums.repeat(len(queries), 1), counts.repeat(len(queries))
            losses, cosines = supervised_queue_softmax(anchors, positives, sums, counts, self.queue.rows, temperature)
        else:
            counts, cosines = torch.zeros_like(positives), positives
            # MoCo's code leaves the query's image in.
            losses = softmax_cross_entropy(anchors, positives, anchor_ids, self.queue.rows, self.queue.ids, temperature)
        terms = {
            "positive_similarity": cosines.detach().mean(),
            "negatives": (self.queue.size - counts).mean(),
            "filled": self.queue.filled.float(),
        }
        candidates = torch.full_like(losses.detach(), 1 + self.queue.size)
        return Loss(average(losses), terms | information(losses, candidates, positives=1 + counts))

    @torch.no_grad()
    def update(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, taken: Taken | None = None) -> None:
        """Enqueues one key per image of all ranks: the twin's view 1.

        So does the symmetric loss: MoCo's notebook for CIFAR-10 enqueues both views, which halves the number of images
        in the queue.
        """
        self.queue.enqueue(self._checked(embeddings, targets)[-1], ids, taken)

    def _checked(self, embeddings: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise ValueError(
                "the queue contrasts with a momentum twin: pass its embeddings of the same views as targets"
            )
        views = 2 if self.settings.symmetric else 1
        if len(embeddings) < views or (len(embeddings) > views and not self.local) or len(targets) != views:
            raise ValueError(
                f"the queue contrasts 2 views of each image; {len(embeddings)} of the encoder and {len(targets)} of "
                f"the twin are not {views} and {views}; set views.num_views=2"
            )
        return targets

    @staticmethod
    def _paired(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Each view with its key, and each local view, which come after them, with every key."""
        local = queries[len(keys) :]
        repeated = [torch.cat([local] * len(keys)), keys.repeat_interleave(len(local), 0)]
        return torch.cat([queries[: len(keys)], repeated[0]]), torch.cat([keys, repeated[1]])


def supervised_queue_softmax(
    queries: Float[Tensor, "batch dim"],
    positives: Float[Tensor, " batch"],
    sums: Float[Tensor, "batch dim"],
    counts: Float[Tensor, " batch"],
    rows: Float[Tensor, "slots dim"],
    temperature: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Mean over positives of −log(e^(s/τ) / Σ e^(s/τ)), and the mean of their products s.

    Positives are the query's own key and the keys of its id in the queue; the sum is over its own key and the whole
    queue (Khosla et al. 2020, equation 2). `positives` are the products of the queries with their own keys, `sums` and
    `counts` come from `key_sums`, `rows` are this rank's part of the queue.
    """
    products = (positives + (queries * sums).sum(1)) / (1 + counts)
    candidates = torch.logaddexp(log_sum_exp(queries, rows, temperature, unit=True), positives / temperature)
    return candidates - products / temperature, products


@torch.no_grad()
def key_sums(queue: Ring, ids: Ids) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"]]:
    """Sum and number of the keys in the queue, on all ranks, that have each id; collective.

    Similarities with all keys of an id add up to that with their sum, so keys need not be compared one by one.
    """
    lengths = distributed.counts(len(ids))
    values, groups = distinct(distributed.gather_without_gradient(ids, lengths))
    places = torch.searchsorted(values, queue.ids).clamp(max=len(values) - 1)
    here, rows = values[places] == queue.ids, queue.rows
    if rows.device.type == "cpu":
        places, rows, here = places[here], rows[here], here[here]
    else:
        # Their number would be waited for: the other keys add zero, spread over the groups.
        places = places.where(here, torch.arange(len(rows), device=rows.device) % len(values))
    rows = at_least_float32(rows)
    counted = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).where(here[:, None], 0)
    sums = distributed.scatter_sum(sum_of_groups(counted, places, len(values))[groups], lengths)
    return sums[:, :-1], sums[:, -1]
