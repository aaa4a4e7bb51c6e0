"""What the settings of all objectives have in common."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.objectives.cost import Cost, Distance, Sizes
from manyviews.objectives.mining import Sampling
from manyviews.objectives.objective import Objective
from manyviews.objectives.relations import Kind, Lists


class Population(NamedTuple):
    """All training images, as far as an objective may use them before the first step."""

    ids: Int[Tensor, " images"]
    """Id of each image: its own number, or that of its class; from 0, without gaps."""
    values: Float[Tensor, "images numbers"] | None = None
    """Continuous labels of each image, where the recipe has them."""
    alike: int | None = None
    """Images of a batch that share an id, at most; None: unknown, and a GPU is waited for where it is needed."""
    keys: int | None = None
    """Number of views, the first ones, that embeddings are compared with; None: all. Local views come after them: they
    are anchors, but nobody's positive or negative (Caron et al. 2020, SwAV, equation 6)."""
    lists: Lists | None = None
    """Relations of the images, of which batches are made then."""
    patches: int | None = None
    """Patches on a side of the grid that each image is cut into; None: it is not."""

    @property
    def size(self) -> int:
        """Number of distinct ids."""
        return int(self.ids.max()) + 1


class Traits(NamedTuple):
    """What the rest of the package needs to know of an objective, beside its loss and its cost."""

    negatives_from: Literal["batch", "queue", "rows"] = "batch"
    """Source of an anchor's negatives: the embeddings of the batch, a queue of the last batches, or one row per id."""
    pairs_off: bool = False
    """Whether embeddings of an id are paired off, with only the second ones of other pairs as negatives."""
    fewest_views: int = 1
    """Minimum number of views of each image, without local ones."""
    most_views: int | None = None
    """Maximum number of views of each image, without local ones; None: unbounded."""
    images_only: str | None = None
    """Why `ids=labels` is not supported, as a clause about the objective; None: ids may be classes."""
    uses_values: Literal["always", "if given"] | None = None
    """Whether it takes the recipe's `values`, the continuous labels of images."""
    relations: tuple[Kind, ...] = ()
    """Kinds of relations between images that it can be trained by."""
    compares_embeddings: bool = False
    """Whether embeddings are trained to be compared with each other. Then they, and not the backbone's features, are
    used for retrieval, clustering and verification."""
    distance: Distance = "cosine"
    """Distance by which embeddings are compared: the cosine, or the Euclidean distance of unnormalized embeddings."""
    noise: int = 0
    """Rows drawn as noise in a step, for all anchors or for each; 0: none."""
    one_draw: bool = True
    """Whether all anchors share one draw of noise."""
    follows_images: bool = False
    """Whether its state has `rows`, one per image, that follow the projector's embeddings."""
    sampling: Sampling | None = None
    """How pairs or triplets of a batch are sampled; None: they are not."""
    twin_momentum: float | None = None
    """Share of its old weights that a momentum twin keeps at each step; None: there is no twin."""
    bounds_information: bool = False
    """Whether its loss, or the scores that it compares, bound the mutual information of anchor and positive."""
    predicts_patches: bool = False
    """Whether it predicts the patches of one view from their contexts, the embeddings of an encoder with a context."""
    splits_views: bool = False
    """Whether the encoder gets view 0 (and the local views) and the twin view 1 only, instead of both views each."""
    shuffles: bool = False
    """Whether images are shuffled over the ranks for the twin, so that its batch norms get other batches."""


class ObjectiveSettings(Settings):
    """Base class of objectives' settings: builds the objective, and describes it.

    A subclass with a `name` can be chosen by it as soon as it is defined, also outside of this package.
    """

    known: ClassVar[dict[str, type[Settings]]] = {}
    """Every subclass by its name."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if "name" in cls.model_fields:
            cls.known[cls.model_fields["name"].default] = cls

    @property
    def traits(self) -> Traits:
        """What the package needs to know; a class variable, or a property of the settings."""
        return Traits()

    @abstractmethod
    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective for embeddings of `dim` dimensions; it is random by `seed` alone."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """Cost of a step on each rank."""


def _warn_if_tiny(temperature: float) -> float:
    if temperature < 0.01:
        warnings.warn(
            f"temperature {temperature} is below 0.01: only the hardest negative of each anchor will count; "
            "0.05 to 0.5 is usual",
            stacklevel=2,
        )
    return temperature


Temperature = Annotated[float, Field(gt=0, le=1e4), AfterValidator(_warn_if_tiny)]


def validate_external(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validates settings of an objective outside of the union by its own class."""
    name = value.get("name") if isinstance(value, dict) else None
    settings = ObjectiveSettings.known.get(name) if isinstance(name, str) else None
    if isinstance(value, ObjectiveSettings):
        return value
    # Members of the union are validated by it, for the paths in its errors.
    return validate(value) if settings is None or settings.__module__.startswith(__package__) else settings(**value)


def renamed(values: Any, old: str, new: str, meanings: Mapping[bool, str]) -> Any:
    """Reads the setting that an earlier version called `old`, true or false, as the `new` one."""
    if not isinstance(values, dict) or not isinstance(values.get(old), bool) or new in values:
        return values
    return {key: value for key, value in values.items() if key != old} | {new: meanings[values[old]]}
