"""Features as a scikit-learn transformer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manyviews.data import Images, InMemory
from manyviews.data.decoding.decode import PILLOW_LIMIT, Decoding, aspect
from manyviews.data.decoding.files import Files, in_threads, refuse_too_many
from manyviews.data.images import Names
from manyviews.data.sources.dataset import picture_of
from manyviews.data.sources.folder import Folder
from manyviews.features import encoding
from manyviews.features.backbone import open_model
from manyviews.features.layers import BACKBONE, OneLayer, layers_of, widths_of
from manyviews.views import StandardView

FINGERPRINT = "0" * 64
"""Placeholder: the fingerprint of these images is not used."""


class Features(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features by the backbone of a run or a timm model, as a scikit-learn transformer.

    `make_pipeline(Features("runs/quickstart"), StandardScaler(), LogisticRegression())` classifies images. `fit` only
    reads the weights, which are pickled with the transformer.

    Images are an array, uint8 [images, height, width] or [images, height, width, channels]; or a tensor, uint8
    [images, height, width] or [images, channels, height, width]; or a list of paths, PIL images, arrays or tensors of
    any sizes. Each is resized and cropped as the backbone's transform for evaluation does. Files and PIL images in
    colour become grey for a backbone that was trained on grey images; the channel of grey images is repeated for one
    that was trained on colour.

    Examples:
        >>> features = Features("light_resnet", pretrained=False).fit()
        >>> features.transform(np.zeros((2, 28, 28), np.uint8)).shape
        (2, 1152)

    Args:
        model: a run folder or a timm name, as in `open_model`.
        pretrained: for a timm name: true for its published weights, false for random ones.
        layer: backbone; projector or embedding (of a run); or a module of the backbone by its name.
        size: side of the backbone's input in pixels; by default that of training.
        batch_size: images per forward pass.
        precision: fp32, bf16 or fp16.
        workers: threads that decode images.
    """

    def __init__(
        self,
        model: Any,
        *,
        pretrained: Any = None,
        layer: Any = BACKBONE,
        size: Any = None,
        batch_size: Any = 256,
        precision: Any = "fp32",
        workers: Any = 2,
    ) -> None:
        # scikit-learn's contract: `__init__` stores parameters unchanged, `fit` checks them.
        self.model = model
        self.pretrained = pretrained
        self.layer = layer
        self.size = size
        self.batch_size = batch_size
        self.precision = precision
        self.workers = workers

    def fit(self, X: Any = None, y: Any = None) -> "Features":  # noqa: N803
        """Reads the weights; the images are not used.

        Raises:
            ValueError: an unknown model or layer, or an invalid parameter.
        """
        for name, least in (("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")
        if self.precision not in ("fp32", *encoding.AUTOCAST):
            raise ValueError(f"precision={self.precision!r} is none of fp32, {', '.join(encoding.AUTOCAST)}")
        model = open_model(str(self.model), pretrained=self.pretrained, size=self.size)
        layers, _ = layers_of(model, (self.layer,))
        self._n_features_out = widths_of(layers, model.blank())[self.layer]
        self.module_ = OneLayer(layers).cpu()
        data = model.recipe.data if model.recipe is not None else None
        # Files are decoded as the run's own images were.
        own = Decoding(model.channels, model.size, (255, 255, 255), PILLOW_LIMIT)
        self.decoding_ = data.decoding() if isinstance(data, Folder) else own
        # The weights are in the module.
        self.opened_ = replace(model, weights={}, encoder=None)
        return self

    def transform(self, X: Any) -> Float32[np.ndarray, "images width"]:  # noqa: N803
        """Encodes images: float32 [images, width].

        Raises:
            ValueError: not images, an image that cannot be read, or an array in colour for a backbone that was trained
                on grey images.
        """
        check_is_fitted(self)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        images, view = images_from(X, self.decoding_, self.opened_.view)
        try:
            rows = encoding.extract(
                self.module_.to(device),
                images,
                view=view,
                device=device,
                batch_size=int(self.batch_size),
                precision=self.precision,
                workers=int(self.workers),
            )
        finally:
            # A pickle must load on a machine without this device.
            self.module_.cpu()
        features: np.ndarray[Any, np.dtype[np.float32]] = rows.numpy()
        return features

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags


def images_from(inputs: Any, decoding: Decoding, view: StandardView) -> tuple[Images, StandardView]:
    """Converts any input of `Features` to images, and the view of them; raises ValueError for anything else."""
    if isinstance(inputs, Tensor | np.ndarray) and inputs.ndim > 1:
        pixels = torch.as_tensor(np.ascontiguousarray(inputs)) if isinstance(inputs, np.ndarray) else inputs.cpu()
        by_channel = isinstance(inputs, np.ndarray) and inputs.ndim == 4
        pixels = _stacked(pixels.permute(0, 3, 1, 2) if by_channel else pixels, decoding.channels)
        if pixels.shape[2] == pixels.shape[3]:
            return _unnamed(pixels.contiguous()), view
        inputs = list(pixels)
    if isinstance(inputs, str | Path | Image.Image) or not hasattr(inputs, "__iter__"):
        raise ValueError(f"{type(inputs).__name__} is not a list of images; for one image give a list of one")
    items = list(inputs)
    if not items:
        raise ValueError("there is no image")
    if all(isinstance(item, str | Path) for item in items):
        return _files(Names(str(Path(item).expanduser()) for item in items), decoding), view
    shown = torch.cat([_shown(picture_of(item), decoding, view) for item in items])
    return _unnamed(shown), replace(view, crop_pct=1.0)


def _files(names: Names, decoding: Decoding) -> Files:
    aspects = torch.ones(len(names), dtype=torch.float64)

    def visit(index: int) -> None:
        aspects[index] = decoding.check(Path(names[index]))

    failures = in_threads(visit, len(names), 1)
    refuse_too_many(Path(), [(names[index], reason) for index, reason in failures.items()], len(names), 0.0)
    return Files(Path(), names, None, (), FINGERPRINT, decoding, max_bad=0.0, aspects=aspects)


def _shown(picture: Image.Image, decoding: Decoding, view: StandardView) -> UInt8[Tensor, "1 channels size size"]:
    """What a view shows of a picture."""
    boxes = view.boxes(torch.tensor([aspect(picture)], dtype=torch.float64))
    return decoding.squares(picture, [(boxes, view.size)], view.interpolation)[0]


def _stacked(pixels: Tensor, channels: int) -> UInt8[Tensor, "images channels height width"]:
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"images are uint8, [images, height, width] or with channels too, not {str(pixels.dtype).split('.')[-1]} "
            f"{list(pixels.shape)}; multiply values in [0, 1] by 255, round and convert them"
        )
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {pixels.shape[1]}, in {list(pixels.shape)}")
    if not len(pixels):
        raise ValueError("there is no image")
    if pixels.shape[1] > channels:
        raise ValueError(f"the images have {pixels.shape[1]} channels, but the backbone was trained on {channels}")
    return pixels


def _unnamed(pixels: Tensor) -> InMemory:
    return InMemory(pixels, Names(map(str, range(len(pixels)))), None, (), FINGERPRINT)
