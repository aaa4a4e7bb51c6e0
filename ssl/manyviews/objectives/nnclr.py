"""Nearest-neighbour contrast: positives are nearest neighbours in the last steps' images."""

import itertools
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from manyviews.engine import normalize, top_k
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes
from manyviews.objectives.in_batch import other_images
from manyviews.objectives.losses import average, float32_island, information, softmax_cross_entropy
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Taken, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.objectives.sharded_rows import Ring
from manyviews.system import distributed


class NearestNeighbours(ObjectiveSettings):
    """NNCLR (Dwibedi et al. 2021): neighbours in a support set against predictions of views.

    It needs a predictor to work well: `encoder.predictor.layers=2`.
    """

    traits: ClassVar[Traits] = Traits(
        fewest_views=2,
        images_only="whose positives are what lies nearest, whatever its label",
        # A neighbour follows from its view and the support set, so the information of its view is bounded.
        bounds_information=True,
    )

    name: Literal["nearest_neighbours"] = "nearest_neighbours"
    temperature: Temperature = 0.1
    """Divides the similarities; smaller: harder negatives count more."""
    size: int = Field(65_536, gt=0, le=2**31)
    """Projections in the support set, over all ranks; by default as many as lightly keeps. More of them have nearer
    neighbours, but as many as there are images, or more, have each image itself."""

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every image's neighbour in the sharded support set against the batch."""
        batch, dim, processes, queries = sizes.batch, sizes.dim, sizes.processes, sizes.compared
        pairs = (sizes.views - 1) * queries // batch
        # Queries go to all rows, every rank's best similarity to all ranks, and the nearest row of all home with its
        # id.
        traffic = queries * (2 * NUMBER * dim + processes * NUMBER + ID)
        # Neighbours go to the predictions of all, for each pair of views, and in backward the losses' gradients.
        traffic += pairs * batch * (ID + NUMBER * dim + 3 * NUMBER)
        # Ids give the number of negatives; projections and ids go into the support set.
        traffic += batch * (ID + ID + NUMBER * dim)
        products = queries * self.size * dim + pairs * 3 * batch**2 * dim
        return sizes.cost(batch - 1, traffic=traffic, products=products, rows=self.size, row_bytes=NUMBER * dim + ID)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective with an empty support set."""
        return NearestNeighboursObjective(self, dim=dim, seed=seed, keys=population.keys)


class NearestNeighboursObjective(Objective):
    """Loss against a support set with one projection of each image of the last steps.

    A support set of a whole epoch contains each image itself, which is then likely its own neighbour: the loss becomes
    NT-Xent with a positive of the last epoch. As in the paper, the image is not excluded. The term `own_neighbours` is
    the share of images that are their own neighbours.
    """

    def __init__(self, settings: NearestNeighbours, *, dim: int, seed: int, keys: int | None = None) -> None:
        super().__init__()
        self.settings, self.keys = settings, keys
        self.ring = Ring(settings.size, dim, seed=seed)

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's neighbours against all ranks' predictions, over all pairs of views.

        `embeddings` are the predictions, `targets` the projections; without targets the embeddings are both. Local
        views have predictions, and no neighbours.

        Raises:
            ValueError: if there is one view only.
        """
        views = len(embeddings)
        if views < 2:
            raise ValueError(
                f"nearest neighbours of one view are contrasted with another view of each image, and there is {views}; "
                "set views.num_views=2"
            )
        predictions = normalize(embeddings)
        projections = normalize(_projections(embeddings, targets)[: self.keys])
        neighbours, neighbour_ids = self.neighbours(projections.flatten(0, 1), ids.repeat(len(projections)))
        neighbours = neighbours.view_as(projections)
        losses, similarities = [], []
        pairs = itertools.product(range(len(projections)), range(views))
        for view, other in ((view, other) for view, other in pairs if view != other):
            near, predicted = neighbours[view], predictions[other]
            positives = (near * predicted).sum(1)
            losses.append(softmax_cross_entropy(near, positives, ids, predicted, ids, self.settings.temperature))
            similarities.append(positives.detach().mean())
        negatives, mean_losses = other_images(ids).to(predictions.dtype), torch.stack(losses).mean(0)
        terms = {
            "positive_similarity": torch.stack(similarities).mean(),
            "negatives": negatives.mean(),
            "own_neighbours": (neighbour_ids == ids.repeat(len(projections))).to(predictions.dtype).mean(),
            "filled": self.ring.filled.to(predictions.dtype),
        }
        return Loss(average(mean_losses), terms | information(mean_losses, 1 + negatives))

    @torch.no_grad()
    def update(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, taken: Taken | None = None) -> None:
        """Enqueues view 0's projections of all ranks; the other views never enter the support set."""
        self.ring.enqueue(_projections(embeddings, targets)[0], ids, taken)

    @torch.no_grad()
    def neighbours(
        self, projections: Float[Tensor, "queries dim"], ids: Int[Tensor, " queries"]
    ) -> tuple[Float[Tensor, "queries dim"], Int[Tensor, " queries"]]:
        """Finds the nearest rows of the support set over all ranks, with their ids; no gradient.

        Only slots that have been written are searched, where the authors start with random rows; in the first step,
        when there are none, the projections themselves are returned. Of equally near rows the first slot wins.
        """
        lengths = distributed.counts(len(projections))
        queries = distributed.gather_without_gradient(projections, lengths)
        rows, row_ids = torch.zeros_like(queries), torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        similarities, slots = self._nearest(queries)
        winners = distributed.gather_without_gradient(similarities.unsqueeze(0)).argmax(0)
        won = (winners == distributed.rank()) & similarities.isfinite()
        # One rank answers each query, and the others add zeros.
        if len(self.ring.rows):
            rows = self.ring.rows[slots].to(rows.dtype).where(won[:, None], rows)
            row_ids = self.ring.ids[slots].where(won, row_ids)
        filled = self.ring.filled > 0
        neighbours = distributed.scatter_sum(rows, lengths).where(filled, projections)
        return neighbours, distributed.scatter_sum(row_ids, lengths).where(filled, ids)

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity and slot of the nearest of this rank's written rows; −inf and 0 without any."""
        rows, ids = self.ring.rows, None
        if rows.device.type == "cpu":
            # Slots fill from the first on.
            rows = rows[: int((self.ring.filled - self.ring.own.start).clamp(0, len(rows)))]
        else:
            # A GPU would have to be waited for: it searches all, and leaves out those of the id that no image has.
            ids = self.ring.ids, torch.full_like(queries[:, 0], -1, dtype=torch.int64)
        if not len(rows):
            similarities = torch.full_like(queries[:, 0], -torch.inf)
            return similarities, torch.zeros_like(similarities, dtype=torch.int64)
        key_ids, query_ids = ids or (None, None)
        values, indices = top_k(queries, rows, 1, query_ids=query_ids, key_ids=key_ids)
        return values[:, 0], indices[:, 0]

    def shards(self) -> dict[str, int]:
        """The support set."""
        return {"ring.rows": self.ring.size, "ring.ids": self.ring.size}


def _projections(embeddings: Tensor, targets: Tensor | None) -> Tensor:
    return (embeddings if targets is None else targets).detach()
