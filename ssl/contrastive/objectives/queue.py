"""A queue of negatives: the momentum twin's embeddings of the images of the last steps."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contrastive import distributed
from contrastive.objectives.loss import (
    Loss,
    Objective,
    ObjectiveSettings,
    Population,
    Temperature,
    average,
    cross_entropy,
    float32_island,
    information,
)
from contrastive.objectives.ring import Ring
from contrastive.objectives.shards import Storage
from contrastive.similarity import log_sum_exp, normalize


class Queue(ObjectiveSettings):
    """MoCo (He et al. 2020, algorithm 1) with the second version's defaults (Chen et al. 2020).

    The negatives of each anchor are the keys in the queue, on any number of processes, each of which holds its share
    of them; with `per_process` they grow with the processes. They do not grow with gradient accumulation.
    """

    name: Literal["queue"] = "queue"
    temperature: Temperature = 0.2
    """Divides the similarities; smaller: harder negatives count more."""
    size: int = Field(65_536, gt=0)
    """Keys in the queue, which are the negatives of each anchor."""
    per_process: bool = False
    """Take the size for each process: with W processes the queue holds W times as many keys."""
    storage: Storage = "float32"
    """Number format of the keys; the 16-bit formats halve the memory. Arithmetic is float32 all the same."""
    momentum: float = Field(0.999, ge=0, le=1)
    """Share of its old weights the twin keeps at each step."""
    symmetric: bool = False
    """Contrast view 1 with the twin's view 0 too, and take the mean."""
    shuffle: bool = True
    """On several processes, the twin sees the images in other company than the encoder, for batch norm's sake."""

    @property
    def twin_momentum(self) -> float | None:
        """The momentum of the twin that makes the keys."""
        return self.momentum

    @property
    def fewest_views(self) -> int:
        """A query and its key are two views."""
        return 2

    @property
    def most_views(self) -> int | None:
        """A query and its key are two views."""
        return 2

    @property
    def splits_views(self) -> bool:
        """Without symmetry the encoder needs view 0 only, and the twin view 1."""
        return not self.symmetric

    @property
    def shuffles(self) -> bool:
        """Whether the twin's batch is shuffled between processes."""
        return self.shuffle

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """The objective, with a queue of random unit rows drawn from `seed`: the same on any number of processes."""
        return QueueObjective(self, dim=dim, seed=seed)


class QueueObjective(Objective):
    """The queue with its settings."""

    def __init__(self, settings: Queue, *, dim: int, seed: int) -> None:
        super().__init__()
        self.settings = settings
        size = settings.size * (distributed.size() if settings.per_process else 1)
        self.queue = Ring(size, dim, seed=seed, storage=settings.storage)

    def shards(self) -> dict[str, int]:
        """The queue's rows and ids."""
        return {f"queue.{name}": length for name, length in self.queue.shards().items()}

    @float32_island
    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors against the queue as the last step left it.

        With symmetry `embeddings` and `targets` are both views of the encoder and of the twin, and each view is
        contrasted with the other; without, they are view 0 of the encoder and view 1 of the twin.

        Raises:
            ValueError: if there are no targets, or another number of views.
        """
        targets = self._checked(embeddings, targets)
        queries, keys = normalize(embeddings), normalize(targets.detach()).flip(0)
        positives = (queries * keys).sum(2).flatten()
        anchors, anchor_ids = queries.flatten(0, 1), ids.repeat(len(queries))
        losses = queue_softmax(
            anchors, positives, anchor_ids, self.queue.rows, self.queue.ids, self.settings.temperature
        )
        negatives = torch.tensor(float(self.queue.size), device=ids.device)
        terms = {
            "positive_similarity": positives.detach().mean(),
            "negatives": negatives,
            "filled": self.queue.filled.float(),
        }
        return Loss(average(losses), terms | information(losses.detach().mean(), 1 + negatives))

    @torch.no_grad()
    def update(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
    ) -> None:
        """Enqueues one key per image of all processes: the twin's view 1.

        The symmetric loss enqueues no more than that: MoCo's notebook for CIFAR-10 enqueues both views, which halves
        the number of images the queue reaches back to.
        """
        self.queue.enqueue(self._checked(embeddings, targets)[-1], ids)

    def _checked(self, embeddings: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise ValueError(
                "the queue contrasts with a momentum twin: pass its embeddings of the same views as targets"
            )
        views = 2 if self.settings.symmetric else 1
        if len(embeddings) != views or len(targets) != views:
            raise ValueError(
                f"the queue contrasts 2 views of each image; {len(embeddings)} of the encoder and {len(targets)} of "
                f"the twin are not {views} and {views}; set views.num_views=2"
            )
        return targets


def queue_softmax(
    queries: Float[Tensor, "batch dim"],
    positives: Float[Tensor, " batch"],
    ids: Int[Tensor, " batch"],
    rows: Float[Tensor, "slots dim"],
    row_ids: Int[Tensor, " slots"],
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each query's own key against the queue; rows that hold the query's own image are left out.

    `positives` are the products of the queries with their own keys, `rows` this process's part of the queue. MoCo's
    code leaves the query's image in.
    """
    negatives = log_sum_exp(queries, rows, temperature, query_ids=ids, key_ids=row_ids)
    return cross_entropy(negatives, positives / temperature)
