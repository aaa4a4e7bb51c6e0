"""Images as uint8 squares with stable ids: sources, decoding, batch samplers and the loader."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, SerializeAsAny, WrapValidator

from manyviews.data.images import Images, InMemory, Report, Split
from manyviews.data.loader import Batch, Loader
from manyviews.data.relation_order import RelationOrder
from manyviews.data.relations import RelationTable, read_relations
from manyviews.data.sampler import ClassOrder, Order
from manyviews.data.sets import with_sets
from manyviews.data.sources.cifar import CIFAR10, CIFAR100
from manyviews.data.sources.dataset import DATASET, MapDataset, TorchDataset, of_dataset
from manyviews.data.sources.fashion_mnist import FashionMNIST, Sample
from manyviews.data.sources.folder import Folder
from manyviews.data.sources.paths import nearest
from manyviews.data.sources.stl10 import STL10
from manyviews.data.subset import leave_out, of_classes, sample_ids, select
from manyviews.system import distributed
from manyviews.system.names import closest

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "AnyData",
    "Batch",
    "ClassOrder",
    "Data",
    "FashionMNIST",
    "Folder",
    "Images",
    "InMemory",
    "Loader",
    "MapDataset",
    "Order",
    "RelationOrder",
    "RelationTable",
    "Report",
    "Sample",
    "Split",
    "TorchDataset",
    "background_of",
    "leave_out",
    "of_classes",
    "of_dataset",
    "read_relations",
    "sample_ids",
    "select",
    "shorthand",
    "with_sets",
]

logger = logging.getLogger(__name__)

Sources = Sample | FashionMNIST | CIFAR10 | CIFAR100 | STL10 | Folder
AnyData = Sources | TorchDataset


def _dataset_or(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validates the settings of a dataset that a program passes, which no command line has a name for."""
    if isinstance(value, TorchDataset):
        return value
    return TorchDataset(**value) if isinstance(value, dict) and value.get("name") == DATASET else validate(value)


Data = Annotated[Sources, Field(discriminator="name"), WrapValidator(_dataset_or), SerializeAsAny()]


def background_of(data: AnyData | None) -> tuple[int, int, int] | None:
    """RGB colour behind transparent pixels of a folder's images; None for other data."""
    return data.decoding().background if isinstance(data, Folder) else None


def shorthand(value: str) -> dict[str, Any]:
    """Settings for `data=value`, a known name or else a folder; ValueError if neither exists.

    Examples:
        >>> shorthand("stl10")
        {'name': 'stl10'}
    """
    known = [source.model_fields["name"].default for source in get_args(Sources)]
    path = Path(value).expanduser()
    if value in known:
        if path.is_dir() and not distributed.rank():
            logger.warning(
                "data=%s is the data set of that name; data=./%s reads the folder %s", value, value, path.absolute()
            )
        return {"name": value}
    if path.exists():
        return {"name": "folder", "path": value}
    near = closest(value, known)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"data={value} is neither a known name{hint}: {', '.join(known)}; nor an existing path: {nearest(path)}"
    )
