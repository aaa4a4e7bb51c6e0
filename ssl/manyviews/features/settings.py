"""Settings and images of the commands that encode images by a backbone."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field

from manyviews.config import Settings, vocabulary
from manyviews.data import Data, Split, shorthand
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import Precision
from manyviews.system.console import Console
from manyviews.views import enlarged


class EncodeSettings(Settings):
    """Settings of the commands that encode images by a backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}
    synonyms: ClassVar[Mapping[str, tuple[str, ...]]] = vocabulary.KEYS
    hints: ClassVar[Mapping[str, str]] = vocabulary.HINTS

    data: Data | None = None
    """The images; null: the run's own, or for a timm model the bundled sample."""
    batch_size: int = Field(256, ge=1, le=1_048_576)
    """Images encoded at once by each process; the features depend on it by rounding alone."""
    precision: Precision = "fp32"
    """Arithmetic of the backbone: bf16 and fp16 are faster where the device is built for them; the files are fp32."""
    workers: int = Field(2, ge=0, le=1024)
    """Threads that decode images, for each process."""

    def data_of(self, opened: PretrainedBackbone) -> Data | None:
        """The data of the settings, or else of the run."""
        return self.data or (opened.recipe.data if opened.recipe is not None else None)


def images_of(opened: PretrainedBackbone, settings: EncodeSettings, console: Console) -> Split:
    """Reads the images of the settings or the run; raises ValueError if none or with too many channels."""
    data = settings.data_of(opened)
    if data is None:
        raise ValueError(
            f"{opened.name} has no images of its own; say which with data=FOLDER, or the name of a data set"
        )
    with console.bar():
        split = data.build(workers=settings.workers, report=console.report)
    # Fewer channels are fine: `PretrainedBackbone.prepare` repeats them.
    if split.train.channels > opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but {opened.name} was trained on {opened.channels}: for "
            f"a folder, use data.channels={opened.channels}"
        )
    if split.layout:
        console.say(f"images     {split.layout}")
    larger = enlarged(opened.size, split.train.size, data)
    if larger is not None:
        console.warn(larger)
    return split
