"""Log-ratio loss (Kim et al. 2019): ratios of distances become those of continuous labels."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from manyviews.engine import squared_distance_rows, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import Cost, Sizes, all_pairs
from manyviews.objectives.labels import Labels, mean_squared_distance
from manyviews.objectives.losses import float32_island, gather_views, share_of_mean
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.relations import Lists, list_batch
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits

Squared = Literal["both", "embeddings", "neither"]


class LogRatio(ObjectiveSettings):
    """Log-ratio loss (Kim et al. 2019) over all triplets of a batch of unnormalised embeddings.

    It needs the recipe's `values`, the continuous labels, but no class, positive or margin: the distances of an image
    from any two others are to be in the ratio of its label distances.
    """

    traits: ClassVar[Traits] = Traits(
        uses_values="always", relations=("triplets",), compares_embeddings=True, distance="euclidean"
    )

    name: Literal["log_ratio"] = "log_ratio"
    squared: Squared = "both"
    """Which distances are squared: both (the paper); neither, a quarter of it (the authors' code); or those of the
    embeddings alone, which are then to grow as the roots of label distances."""
    epsilon: float = Field(1e-6, gt=0, le=1e4)
    """Added to each squared distance inside the logarithm, as a share of the mean squared distance."""

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every embedding against all of the batch."""
        return all_pairs(sizes, "euclidean")

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with the label of each image.

        Raises:
            ValueError: if the population has no values, or other images are to be items of lists.
        """
        if population.values is None:
            raise ValueError(
                "objective=log_ratio compares distances with those of continuous labels, and there are none; set "
                "values=pixels, values=labels, or values=FILE with numbers for each image"
            )
        if population.lists is not None and population.lists.others:
            raise ValueError(
                "objective=log_ratio compares distances within each triplet, with no other images of the batch; leave "
                "them out, or leave out the relations: then all triplets of the batch are compared"
            )
        return LogRatioObjective(self, population.values, population.keys, population.lists)


class LogRatioObjective(Objective):
    """Log-ratio loss with the labels of all images."""

    def __init__(
        self,
        settings: LogRatio,
        values: Float[Tensor, "images numbers"],
        keys: int | None = None,
        lists: Lists | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.labels, self.keys, self.lists = settings, Labels(values), keys, lists

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of the triplets whose anchors are this rank's."""
        squared, epsilon, keys = self.settings.squared, self.settings.epsilon, self.keys
        if self.lists is None:
            return log_ratio(embeddings, ids, self.labels, squared=squared, epsilon=epsilon, keys=keys)
        lists = self.lists
        return log_ratio_of_lists(embeddings, ids, self.labels, lists, squared=squared, epsilon=epsilon, keys=keys)


@float32_island
def log_ratio(
    embeddings: Embeddings, ids: Ids, labels: Labels, *, squared: Squared, epsilon: float, keys: int | None = None
) -> Loss:
    """Mean over triplets of {log(D(f_a, f_i) / D(f_a, f_j)) − log(D(y_a, y_i) / D(y_a, y_j))}².

    D is the squared Euclidean distance (Kim et al. 2019, equation 2). Every embedding of the batch is an anchor a, and
    i < j are all pairs of others whose labels differ from the anchor's. The authors take one anchor from each batch,
    its nearest neighbours by label among the others, and all pairs i < j.

    An embedding of equal label, such as another view of the anchor's image, is neither i nor j: it has no ratio, and
    with ε in its place the arbitrary log ε would outweigh all other terms. It is pulled near by the others: both
    embeddings are to have the same distances from all the rest.

    With uᵢ = log D(f_a, f_i) − log D(y_a, y_i) the sum over the pairs of M others is M Σ(uᵢ − ū)², at the cost of the
    distances. ε (`epsilon`) is a share of the mean squared distance of this batch's embeddings, and of all labels; the
    authors add 1e-6 itself. Hence the loss depends neither on the length of embeddings nor on the unit of labels, and ε
    stays above the rounding of distances. It is always added to the squared distance, which keeps gradients finite
    where embeddings coincide.

    `ids` are the images' numbers among all images, whose `labels` are given. A distance D that is not `squared` counts
    half, by its logarithm. With `keys` only embeddings of the first so many views are i or j.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> loss = log_ratio(points[None], torch.arange(3), Labels(points), squared="both", epsilon=1e-6)
        >>> round(loss.total.item(), 4)  # distances as the labels have them
        0.0
    """
    gathered = gather_views(at_least_float32(embeddings), ids, keys)
    left, right = squared_distance_rows(embeddings.flatten(0, 1), gathered.rows)
    between = labels.between(ids.repeat(len(embeddings)), gathered.ids, gathered.rows.dtype)
    term_of = _term(gathered.rows, labels, squared, epsilon)

    def term(tile: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        label_squares, equal = between(tile)
        return term_of(products, label_squares, ~equal)

    total, figures = sum_over_tiles(left, right, term)
    return _loss(total, figures, len(left))


@float32_island
def log_ratio_of_lists(
    embeddings: Embeddings,
    ids: Ids,
    labels: Labels,
    lists: Lists,
    *,
    squared: Squared,
    epsilon: float,
    keys: int | None = None,
) -> Loss:
    """Mean of the same over given triplets a, i, j instead of all of the batch.

    Which of i and j is the positive does not matter: the ratio of the label distances says it. Where one of them has
    the anchor's label there is no ratio, and no loss.

    Examples:
        >>> from manyviews.objectives.relations import Relations
        >>> lists = Lists(Relations("triplets", torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.0]]), size=3))
        >>> points, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [9.0]])
        >>> loss = log_ratio_of_lists(
        ...     points[None], torch.arange(3), Labels(labels), lists, squared="embeddings", epsilon=1e-6
        ... )
        >>> round(loss.total.item(), 4)  # squared distances as the labels have them
        0.0
    """
    batch = list_batch(embeddings, ids, lists, "squared_distance", keys=keys)
    everyone = gather_views(at_least_float32(embeddings.detach()), ids, keys).rows
    term_of = _term(everyone, labels, squared, epsilon)
    by_list = ids.view(len(ids) // lists.size, lists.size)
    label_squares, equal = (
        part.repeat(len(embeddings), 1) for part in labels.of_pairs(by_list[:, :1], by_list[:, 1:], everyone.dtype)
    )

    def term(some: slice, products: Tensor, relevances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        return term_of(products, label_squares[some], there & ~equal[some])

    total, figures = batch.sum(term)
    loss = _loss(total, figures, len(batch.queries))
    return loss._replace(terms=loss.terms | {"positive_similarity": batch.positive_similarity})


def _term(
    rows: Float[Tensor, "all dim"], labels: Labels, squared: Squared, epsilon: float
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Function of squared distances, those of labels, and a mask of the compared: their losses' sum, and figures.

    `rows` are the embeddings of the batch.
    """
    dtype = rows.dtype
    # Never 0, or the logarithm would be unbounded where all coincide.
    least = torch.finfo(dtype).eps ** 2
    smallest = epsilon * mean_squared_distance(rows.detach()) + least
    smallest_label = epsilon * labels.scale.to(dtype) + least
    power, label_power = (1.0 if squared != "neither" else 0.5), (1.0 if squared == "both" else 0.5)

    def term(squares: Tensor, label_squares: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        label_distances = label_squares.add(smallest_label).log() * label_power
        distances = squares.clamp(min=0).add(smallest).log() * power
        others = compared.sum(1)
        misfit = _squares_about_the_mean(distances - label_distances, compared)
        spread = _squares_about_the_mean(label_distances, compared)
        triplets = others * (others - 1) // 2
        figures = [triplets.sum(), others.sum(), (others * misfit).sum(), (others * spread).sum()]
        return (others * misfit).sum(), torch.stack([figure.detach().double() for figure in figures])

    return term


def _loss(total: Tensor, figures: Tensor, anchors: int) -> Loss:
    """Mean over the triplets of all ranks, with its terms."""
    triplets, negatives, misfit, spread = figures
    # Embeddings with equal distances throughout would have a misfit equal to the spread of the labels.
    explained = torch.where(spread > 0, 1 - misfit / spread, 0)
    terms = {"negatives": negatives / max(anchors, 1), "explained": explained}
    return Loss(share_of_mean(total, triplets), {name: figure.to(total.dtype) for name, figure in terms.items()})


def _squares_about_the_mean(numbers: Tensor, counted: Tensor) -> Tensor:
    """Σ(u − ū)² over the counted numbers of each row."""
    mean = numbers.where(counted, 0).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return (numbers - mean).where(counted, 0).square().sum(1)
