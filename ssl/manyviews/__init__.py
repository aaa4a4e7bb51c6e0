"""Self-supervised contrastive pretraining: from a folder of images to a backbone."""

from typing import TYPE_CHECKING, Any

# Registers the small-image backbones for `timm.create_model`.
from manyviews.encoder import small_models as small_models

if TYPE_CHECKING:
    from manyviews.features.transformer import Features as Features


def __getattr__(name: str) -> Any:
    """Imports `manyviews.Features` on first use: it has many imports."""
    if name == "Features":
        from manyviews.features.transformer import Features

        return Features
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
