"""A queue of negatives: the momentum twin's embeddings of the images of the last steps."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contrastive import distributed
from contrastive.objectives.loss import Loss, Objective, ObjectiveSettings, Temperature, cross_entropy, float32_island
from contrastive.similarity import log_sum_exp, normalize


class Queue(ObjectiveSettings):
    """MoCo (He et al. 2020, algorithm 1) with the second version's defaults (Chen et al. 2020)."""

    name: Literal["queue"] = "queue"
    temperature: Temperature = 0.2
    """Divides the similarities; smaller: harder negatives count more."""
    size: int = Field(65_536, gt=0)
    """Keys in the queue, which are the negatives of each anchor."""
    momentum: float = Field(0.999, ge=0, le=1)
    """Share of its old weights the twin keeps at each step."""
    symmetric: bool = False
    """Contrast view 1 with the twin's view 0 too, and take the mean."""

    @property
    def twin_momentum(self) -> float | None:
        """The momentum of the twin that makes the keys."""
        return self.momentum

    def build(self, *, dim: int, num_images: int, seed: int) -> Objective:
        """The objective, with a queue of random unit rows drawn from `seed`: the same on every process."""
        return QueueObjective(self, dim=dim, seed=seed)


class QueueObjective(Objective):
    """The queue's state: its rows, their ids, where the next key goes, and how many keys it has received.

    Every process holds the same whole queue: each receives the keys of all processes, in rank order.
    """

    rows: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, settings: Queue, *, dim: int, seed: int) -> None:
        super().__init__()
        self.settings = settings
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", normalize(torch.randn(settings.size, dim, generator=generator)))
        # No image has the id −1: the random rows are negatives for everyone.
        self.register_buffer("ids", torch.full((settings.size,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    @float32_island
    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors against the queue as the last step left it.

        Raises:
            ValueError: if there are no targets, or not two views.
        """
        targets = _two_views(embeddings, targets)
        queries, keys = normalize(embeddings), normalize(targets.detach())
        directions = [(0, 1), (1, 0)] if self.settings.symmetric else [(0, 1)]
        losses, similarities = [], []
        for query_view, key_view in directions:
            positives = (queries[query_view] * keys[key_view]).sum(1)
            loss = queue_softmax(queries[query_view], positives, ids, self.rows, self.ids, self.settings.temperature)
            losses.append(loss.mean())
            similarities.append(positives.detach().mean())
        terms = {"positive_similarity": torch.stack(similarities).mean(), "filled": self.filled.float()}
        return Loss(torch.stack(losses).mean(), terms)

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
        targets = _two_views(embeddings, targets)
        keys = distributed.gather_without_gradient(normalize(targets[1])).to(self.rows.dtype)
        key_ids = distributed.gather_without_gradient(ids)
        # Of a batch larger than the queue the last keys remain, where one after the other would have left them.
        skipped = max(len(keys) - self.settings.size, 0)
        places = (self.pointer + torch.arange(skipped, len(keys), device=keys.device)) % self.settings.size
        self.rows.index_copy_(0, places, keys[skipped:])
        self.ids.index_copy_(0, places, key_ids[skipped:])
        self.pointer.add_(len(keys)).remainder_(self.settings.size)
        self.filled.add_(len(keys)).clamp_(max=self.settings.size)


def queue_softmax(
    queries: Float[Tensor, "batch dim"],
    positives: Float[Tensor, " batch"],
    ids: Int[Tensor, " batch"],
    rows: Float[Tensor, "size dim"],
    row_ids: Int[Tensor, " size"],
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each query's own key against the queue; rows that hold the query's own image are left out.

    `positives` are the products of the queries with their own keys. MoCo's code leaves the query's image in.
    """
    negatives = log_sum_exp(queries, rows, temperature, query_ids=ids, key_ids=row_ids)
    return cross_entropy(negatives, positives / temperature)


def _two_views(embeddings: Tensor, targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("the queue contrasts with a momentum twin: pass its embeddings of the same views as targets")
    if len(embeddings) != 2:
        raise ValueError(f"the queue contrasts 2 views of each image, not {len(embeddings)}; set views.num_views=2")
    return targets
