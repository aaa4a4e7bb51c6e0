"""Contrastive predictive coding: patches of an image predicted from the context of those above."""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes, softmax_traffic
from manyviews.objectives.in_batch import other_images
from manyviews.objectives.losses import average, cross_entropy, float32_island, information
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.system import distributed

FARTHEST = 5
"""Rows ahead that the paper predicts, of seven."""


class CPC(ObjectiveSettings):
    """Contrastive predictive coding, CPC (van den Oord et al. 2018, equations 2 to 4), on patches (section 3.3).

    With encoder.context. From the context of a patch the patches in the rows below it are predicted, each distance by a
    matrix of its own: f = exp(zᵀ W c). The negatives are the other patches of all images of the batch, those of the
    same image among them, as in the code of Hénaff et al. 2020 (CPC v2, appendix).
    """

    traits: ClassVar[Traits] = Traits(
        images_only="which predicts patches of the same image",
        most_views=1,
        predicts_patches=True,
        bounds_information=True,
    )

    name: Literal["cpc"] = "cpc"
    steps: int | None = Field(None, ge=1, le=63)
    """Rows ahead to the farthest patch that is predicted; null: all rows, at most 5."""
    skip: int = Field(0, ge=0, le=62)
    """Nearest rows that are not predicted, for they overlap: 1 leaves out those that share pixels by half."""
    temperature: Temperature = 0.1
    """Divides the scores; the matrices learn any scale, and this is the one that they start with."""

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every prediction against every patch of the batch, and of the predictions, with no memory."""
        side = math.isqrt(sizes.views // 2)
        contexts = side * sum(side - step for step in self.distances(side)) * sizes.batch
        patches, dim = side**2 * sizes.batch, sizes.dim
        # In backward the sums' gradients go to all patches, whose own gradient stays; ids give the number of negatives.
        traffic = softmax_traffic(contexts, dim) + contexts * NUMBER + sizes.batch * ID
        products = 4 * contexts * patches * dim + 3 * contexts * dim**2
        return sizes.cost(patches - 1, traffic=traffic, products=products)

    def distances(self, side: int) -> range:
        """The rows ahead that are predicted in a grid of `side` rows.

        Raises:
            ValueError: if there are none, or not so many rows.
        """
        steps = min(FARTHEST, side - 1) if self.steps is None else self.steps
        if steps >= side:
            raise ValueError(
                f"objective.steps={steps}, but of {side} rows of patches at most {side - 1} lie ahead; set "
                f"objective.steps={side - 1}, or encoder.context.patches={steps + 1}"
            )
        if self.skip >= steps:
            raise ValueError(
                f"objective.skip={self.skip} leaves nothing to predict of {steps} steps; set objective.skip={steps - 1}"
                " or less"
            )
        return range(self.skip + 1, steps + 1)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; its only state is a matrix for each step, an identity.

        Raises:
            ValueError: if images are not cut into patches, or there are fewer rows of them than steps.
        """
        if population.patches is None:
            raise ValueError("objective=cpc predicts patches of an image: set encoder.context=gru")
        return CPCObjective(self, dim=dim, side=population.patches)


class CPCObjective(Objective):
    """CPC with its matrices W, [steps, dim, dim], equal on all ranks."""

    def __init__(self, settings: CPC, *, dim: int, side: int) -> None:
        super().__init__()
        self.temperature, self.distances = settings.temperature, settings.distances(side)
        self.matrices = nn.Parameter(torch.eye(dim).repeat(len(self.distances), 1, 1))

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's predictions against the patches of all ranks."""
        return predictive_coding(embeddings, ids, self.matrices, self.distances, self.temperature)


@float32_island
def predictive_coding(
    embeddings: Embeddings,
    ids: Ids,
    matrices: Float[Tensor, "steps dim dim"],
    distances: range,
    temperature: float,
) -> Loss:
    """Cross-entropy of each patch against all patches of the batch, by predictions of rows above it.

    `embeddings` are the patches z of a square grid, row by row, then their contexts c. For a step k of `distances` the
    patch k rows below a context is its positive, f_k(z, c) = exp(zᵀ W_k c) (van den Oord et al. 2018, equation 3), and
    all other patches of all images, over all ranks, are negatives; the loss (equation 4) is the mean over the images,
    places and steps, each step counted alike. W_k is its matrix divided by the dimension and the temperature. Of an
    image that comes twice, the same patch is neither.

    The terms have the bound of the mutual information of a context and a patch, log N − loss.

    Examples:
        >>> z = torch.eye(4).unsqueeze(1).repeat(2, 3, 1)
        >>> predictive_coding(z, torch.arange(3), torch.eye(4)[None], range(1, 2), 0.5).total
        tensor(2.6352)
    """
    side, batch, dim = math.isqrt(len(embeddings) // 2), len(ids), embeddings.shape[2]
    patches, contexts = at_least_float32(embeddings).unflatten(0, (2, side, side))
    places = torch.arange(side**2, device=ids.device).view(side, side, 1)
    names = ids * side**2 + places
    # Of each step: [rows, columns, batch, dim].
    queries = [contexts[:-step] @ matrix.T / dim for step, matrix in zip(distances, matrices, strict=True)]
    targets = [patches[step:] for step in distances]
    flat = torch.cat([part.flatten(0, 2) for part in queries])
    others = log_sum_exp(
        flat,
        patches.flatten(0, 2),
        temperature,
        query_ids=torch.cat([names[step:].flatten() for step in distances]),
        key_ids=names.flatten(),
    )
    positives = (flat * torch.cat([part.flatten(0, 2) for part in targets])).sum(1)
    losses = cross_entropy(others, positives / temperature)
    images = sum(distributed.counts(batch))
    negatives = (other_images(ids) + (side**2 - 1) * images).to(losses.dtype)
    of_steps = [part.view(-1, batch) for part in losses.split([len(part.flatten(0, 2)) for part in targets])]
    of_images = torch.stack([part.mean(0) for part in of_steps]).mean(0)
    with torch.no_grad():
        similar = [
            (normalize(part) * normalize(target)).sum(-1).mean() for part, target in zip(queries, targets, strict=True)
        ]
        terms = {"positive_similarity": torch.stack(similar).mean(), "negatives": negatives.mean()}
    terms |= information(of_images, 1 + negatives)
    return Loss(average(of_images), terms)
