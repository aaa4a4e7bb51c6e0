"""What every objective returns, and what their settings have in common."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyviews.config import Settings
from manyviews.engine import log_sum_exp
from manyviews.objectives.cost import Cost, Sizes
from manyviews.objectives.gathered import share_of_mean
from manyviews.system import distributed

P = ParamSpec("P")
R = TypeVar("R")
Embeddings = Float[Tensor, "views batch dim"]
Ids = Int[Tensor, " batch"]
NegativesFrom = Literal["batch", "queue", "rows"]
Use = Literal["always", "if given"]


class Loss(NamedTuple):
    """One step's loss and the figures worth logging beside it."""

    total: Float[Tensor, ""]
    """The mean over the local anchors; the mean over processes is the loss of the whole batch."""
    terms: dict[str, Tensor]
    """Detached scalars of this process."""


class Population(NamedTuple):
    """What an objective may know of all images before the first step."""

    ids: Int[Tensor, " images"]
    """What each image goes by: its own number, or that of its class; from 0, without gaps."""
    values: Float[Tensor, "images numbers"] | None = None
    """Continuous labels of each image, where the recipe has them."""

    @staticmethod
    def each(count: int) -> "Population":
        """So many images, of which each is its own class."""
        return Population(torch.arange(count))

    @property
    def size(self) -> int:
        """How many different ids there are."""
        return int(self.ids.max()) + 1

    @property
    def grouped(self) -> bool:
        """Whether several images have one id, as with labels."""
        return self.size < len(self.ids)

    @property
    def frequencies(self) -> Int[Tensor, " ids"]:
        """How many images have each id."""
        return self.ids.bincount()


def cross_entropy(
    negatives: Float[Tensor, "*anchors"], positives: Float[Tensor, "*anchors"]
) -> Float[Tensor, "*anchors"]:
    """−log(e^p / (e^p + Σ e^n)) from the log-sum-exp of the negatives' logits and the positive's logit.

    0, with a zero gradient, where the negatives are −inf, for there are none.
    """
    # PyTorch's own threshold of 20 is 2e-9 off, which float64 sees.
    return F.softplus(negatives - positives, threshold=40)


def softmax_cross_entropy(
    queries: Float[Tensor, "queries dim"],
    positives: Float[Tensor, " queries"],
    ids: Int[Tensor, " queries"],
    rows: Float[Tensor, "rows dim"],
    row_ids: Int[Tensor, " rows"],
    temperature: float,
) -> Float[Tensor, " queries"]:
    """The cross-entropy of each query's positive against the rows of all processes that have another id.

    Args:
        queries: of this process.
        positives: their products with their own positives.
        ids: theirs.
        rows: of this process.
        row_ids: theirs.
        temperature: of the softmax.
    """
    others = log_sum_exp(queries, rows, temperature, query_ids=ids, key_ids=row_ids)
    return cross_entropy(others, positives / temperature)


def average(losses: Float[Tensor, " anchors"]) -> Float[Tensor, ""]:
    """This process's part of the mean over the anchors of all processes: the mean of the parts is that mean.

    It is the local mean where all processes have equally many anchors, and stays exact where a last batch is uneven.
    """
    return losses.sum() * (distributed.world_size() / sum(distributed.counts(len(losses))))


def information(
    losses: Float[Tensor, " anchors"],
    candidates: Float[Tensor, " anchors"],
    *,
    positives: Float[Tensor, " anchors"] | None = None,
    counted: Bool[Tensor, " anchors"] | None = None,
) -> dict[str, Tensor]:
    """What InfoNCE losses say of the mutual information of anchor and positive: a lower bound and its ceiling, in nats.

    I ≥ log N − loss (van den Oord et al. 2018, section 2.3), with N candidates for each anchor, its positives among
    them; and this for any scores (Poole et al. 2019, equation 10), whatever loss they are trained by. The bound can
    never say more than log N; with P positives that share the softmax, as in SupCon, no more than log N − log P.

    Collective: the mean over the processes is the mean over the anchors of all of them.

    Args:
        losses: of each anchor, the mean over its positives of −log of the positive's share of the softmax.
        candidates: N of each anchor.
        positives: P of each anchor; none: 1.
        counted: which anchors count; none: all.
    """
    highest = candidates.clamp(min=1).log()
    ceiling = highest if positives is None else highest - positives.clamp(min=1).log()
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    figures = torch.stack([highest - losses.detach(), ceiling]).where(counted, 0).sum(1)
    bound, ceiling = share_of_mean(figures, counted.sum())
    return {"information": bound, "ceiling": ceiling}


def float32_island(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps autocast out of a function of tensors: at a temperature of 0.07 bfloat16 logits are off by 0.02."""

    @functools.wraps(function)
    def island(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments, **options)

    return island


class Objective(nn.Module, ABC):
    """What an objective is to the loop: a loss of embeddings, and memory that moves after the weights have."""

    @abstractmethod
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Embeddings | None, step: int) -> Loss:
        """The loss of this process's anchors; `targets` are the momentum twin's embeddings where there is a twin."""

    @torch.no_grad()
    def update(self, embeddings: Embeddings, ids: Ids, targets: Embeddings | None) -> None:
        """Moves the memory after a step that was taken; an objective without memory has nothing to do."""

    def shards(self) -> dict[str, int]:
        """The length over all processes of what is spread over them, by its name in the state dictionary.

        Each process holds the part `distributed.share(length)` of the first axis; all other state is equal everywhere.
        """
        return {}


class Stateless(Objective):
    """A pure function of embeddings, ids and step as an objective: it keeps no state."""

    def __init__(self, loss: Callable[[Embeddings, Ids, int], Loss]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Embeddings, ids: Ids, targets: Embeddings | None, step: int) -> Loss:
        """The loss of this process's anchors against the embeddings of all processes."""
        return self.loss(embeddings, ids, step)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        arrived = gradients[0]
        return gradient * arrived.view(*arrived.shape, *[1] * (gradient.ndim - arrived.ndim)), None, None


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A value with the gradient of its sum in the inputs, where autograd would keep all that both were made of.

    Args:
        inputs: that the value is a function of, one row for each number of the value, or all for one number.
        value: with one number for each row of the inputs, or one for all.
        gradient: of the shape of the inputs.
    """
    result: Tensor = _WithGradient.apply(inputs, value, gradient)
    return result


class ObjectiveSettings(Settings):
    """What the settings of all objectives have in common, which is all that the rest of the package knows of one."""

    negatives_from: ClassVar[NegativesFrom] = "batch"
    """Where an anchor's negatives come from, and what it shares an id with: the embeddings of the batch, a queue of the
    last batches, or rows of which each stands for an id."""
    pairs_off: ClassVar[bool] = False
    """Whether embeddings of an id are paired off, with only the second ones of other pairs as negatives."""
    fewest_views: ClassVar[int] = 1
    """Views of each image that it needs at least."""
    most_views: ClassVar[int | None] = None
    """Views of each image that it can use; none: any number."""
    images_only: ClassVar[str | None] = None
    """Why `ids=labels` does not go with it, as a clause about it; none: its ids may be classes."""
    uses_values: ClassVar[Use | None] = None
    """Whether it takes the recipe's `values`, the continuous labels of images."""
    compares_embeddings: ClassVar[bool] = False
    """Whether embeddings are trained to be compared with each other, so that they, and not the backbone's features, are
    what images are retrieved, clustered and verified by."""

    @property
    def distance(self) -> Literal["cosine", "euclidean"]:
        """By which embeddings are to be compared: the cosine, or the Euclidean distance of embeddings as they are."""
        return "cosine"

    @abstractmethod
    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """The objective for embeddings of `dim` dimensions; what is random in it follows from `seed`."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """What a step costs each process."""

    @property
    def noise(self) -> int:
        """How many rows are drawn as noise in a step, for all anchors or for each; 0: it draws none."""
        return 0

    @property
    def one_draw(self) -> bool:
        """Whether all anchors have the same noise."""
        return True

    @property
    def follows_images(self) -> bool:
        """Whether its state has `rows`, one for each image, which follow the embeddings of the projector."""
        return False

    @property
    def twin_momentum(self) -> float | None:
        """Share of its old weights that a momentum twin keeps at each step; none: there is no twin."""
        return None

    @property
    def bounds_information(self) -> bool:
        """Whether its loss, or the scores that it compares, bound the mutual information of anchor and positive."""
        return False

    @property
    def splits_views(self) -> bool:
        """Whether the encoder sees view 0 only and the twin view 1 only, instead of both seeing both."""
        return False

    @property
    def shuffles(self) -> bool:
        """Whether the twin's batch norms are to see other companies of images than the encoder's, across processes."""
        return False


def _warn_if_tiny(temperature: float) -> float:
    if temperature < 0.01:
        warnings.warn(
            f"temperature {temperature} is below 0.01: only the hardest negative of each anchor will count; "
            "0.05 to 0.5 is usual",
            stacklevel=2,
        )
    return temperature


Temperature = Annotated[float, Field(gt=0, le=1e4), AfterValidator(_warn_if_tiny)]
