"""What all commands have in common that encode images by a backbone: settings, and the images themselves."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field

from manyviews.config import Settings
from manyviews.data import Data, Split, shorthand
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import Precision
from manyviews.system.console import Console
from manyviews.views import enlarged


class EncodeSettings(Settings):
    """What all have in common that encode images by a backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    data: Data | None = None
    """The images; null: the run's own, or for a timm model the bundled sample."""
    batch_size: int = Field(256, ge=1, le=1_048_576)
    """Images encoded at once by each process; the features depend on it by rounding alone."""
    precision: Precision = "fp32"
    """Arithmetic of the backbone: bf16 and fp16 are faster where the device is built for them; the files are fp32."""
    workers: int = Field(2, ge=0, le=1024)
    """Threads that decode images, for each process."""

    def data_of(self, opened: PretrainedBackbone) -> Data | None:
        """The data that are named, else the run's own."""
        return self.data or (opened.recipe.data if opened.recipe is not None else None)


def images_of(opened: PretrainedBackbone, settings: EncodeSettings, console: Console) -> Split:
    """The images that were asked for, as the backbone can see them.

    Raises:
        ValueError: if they are not named, cannot be read, or have other channels than the backbone takes.
    """
    data = settings.data_of(opened)
    if data is None:
        raise ValueError(f"{opened.name} has no images of its own; say which with data=…, a folder or a known name")
    with console.bar():
        split = data.build(workers=settings.workers, report=console.report)
    # Grey images are shown in grey to a backbone that has learned from colour.
    if split.train.channels > opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but {opened.name} has learned from {opened.channels}: "
            f"for a folder, data.channels={opened.channels} reads them so"
        )
    if split.layout:
        console.say(f"images     {split.layout}")
    larger = enlarged(opened.size, split.train.size, data)
    if larger is not None:
        console.warn(larger)
    return split
