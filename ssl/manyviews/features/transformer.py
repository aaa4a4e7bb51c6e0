"""Features as a step of a scikit-learn pipeline."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manyviews.data import Images, InMemory
from manyviews.data.decoding.decode import PILLOW_LIMIT, Decoding
from manyviews.data.decoding.files import Files
from manyviews.data.images import Names
from manyviews.data.sources.folder import Folder
from manyviews.features import encoding
from manyviews.features.backbone import PretrainedBackbone, open_model
from manyviews.features.layers import BACKBONE, OneLayer, layers_of, widths_of


class Features(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Images become features by a run's backbone, or a timm model's, as a scikit-learn transformer.

    `make_pipeline(Features("runs/quickstart"), StandardScaler(), LogisticRegression())` classifies images. Nothing is
    learned from the images: `fit` reads the weights, which are then part of the transformer, also where it is pickled.

    Images are paths; or pictures of PIL; or numpy arrays, uint8 [images, height, width] or [images, height, width,
    channels]; or tensors, uint8 [images, height, width] or [images, channels, height, width]; or a list of any of
    these, one each, of any sizes. Of each the central square is seen. Files and pictures in colour become grey for a
    backbone that has learned from grey, and grey images are shown in grey to one that has learned from colour.

    Args:
        model: a run folder or a timm name, as in `open_model`.
        pretrained: for a timm name: its published weights, or random ones.
        layer: backbone; projector or embedding (of a run); or a module of the backbone by its name.
        size: side of the square that the backbone sees; by default what it was trained on.
        batch_size: images per forward pass; bounds the memory.
        precision: fp32, or bf16 or fp16, which are faster where the device is built for them.
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
        # scikit-learn's contract: parameters are kept as they came, and looked at by `fit`.
        self.model = model
        self.pretrained = pretrained
        self.layer = layer
        self.size = size
        self.batch_size = batch_size
        self.precision = precision
        self.workers = workers

    def fit(self, X: Any = None, y: Any = None) -> "Features":  # noqa: N803
        """Reads the weights; the images are not looked at.

        Raises:
            ValueError: if the model or the layer cannot be had, or a parameter makes no sense.
        """
        for name, least in (("batch_size", 1), ("workers", 0)):
            given = getattr(self, name)
            if not isinstance(given, int | np.integer) or given < least:
                raise ValueError(f"{name}={given!r} is not a whole number of at least {least}")
        if self.precision not in ("fp32", *encoding.AUTOCAST):
            raise ValueError(f"precision={self.precision!r} is none of fp32, {', '.join(encoding.AUTOCAST)}")
        opened = open_model(str(self.model), pretrained=self.pretrained, size=self.size)
        layers, _ = layers_of(opened, (self.layer,))
        self._n_features_out = widths_of(layers, opened.blank())[self.layer]
        self.module_ = OneLayer(layers).cpu()
        self.decoding_ = _decoding(opened)
        # The weights are in the module.
        self.opened_ = dataclasses.replace(opened, weights={}, encoder=None)
        return self

    def transform(self, X: Any) -> Float32[np.ndarray, "images width"]:  # noqa: N803
        """The features of images.

        Raises:
            ValueError: if these are no images, or one of them cannot be read, or is in colour where the backbone has
                learned from grey.
        """
        check_is_fitted(self)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            rows = encoding.extract(
                self.module_.to(device),
                images_from(X, self.decoding_),
                prepare=self.opened_.prepare,
                device=device,
                batch_size=int(self.batch_size),
                precision=self.precision,
                workers=int(self.workers),
            )
        finally:
            # Pickled, it must open where there is no such device.
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


def images_from(given: Any, decoding: Decoding) -> Images:
    """Images of any kind that `Features` takes, as uint8 squares.

    Raises:
        ValueError: if these are no such images.
    """
    if isinstance(given, Tensor):
        return _stacked(given, decoding.channels)
    if isinstance(given, np.ndarray) and given.ndim > 1:
        pixels = torch.from_numpy(np.ascontiguousarray(given))
        return _stacked(pixels.permute(0, 3, 1, 2) if given.ndim == 4 else pixels, decoding.channels)
    if isinstance(given, str | Path | Image.Image) or not hasattr(given, "__iter__"):
        raise ValueError(f"{type(given).__name__} is not a list of images; for one image give a list of one")
    items = list(given)
    if not items:
        raise ValueError("there is no image")
    if all(isinstance(item, str | Path) for item in items):
        names = Names(str(Path(item).expanduser()) for item in items)
        return Files(Path(), names, None, (), _unmarked(items), decoding, max_bad=0.0, workers=0)
    pixels = torch.stack([_square(item, decoding) for item in items])
    return _unnamed(pixels)


def _decoding(opened: PretrainedBackbone) -> Decoding:
    """As the run's own images were decoded, or at the size that the backbone sees."""
    data = opened.recipe.data if opened.recipe is not None else None
    return (
        data.decoding()
        if isinstance(data, Folder)
        else Decoding(opened.channels, opened.size, (255,) * 3, PILLOW_LIMIT)
    )


def _stacked(pixels: Tensor, channels: int) -> InMemory:
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"images are uint8, [images, height, width] or with channels too, not {str(pixels.dtype).split('.')[-1]} "
            f"{list(pixels.shape)}; values in [0, 1] are to be multiplied by 255, rounded and converted"
        )
    pixels = pixels.cpu()
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {pixels.shape[1]}, in {list(pixels.shape)}")
    if not len(pixels):
        raise ValueError("there is no image")
    if pixels.shape[1] > channels:
        raise ValueError(f"the images have {pixels.shape[1]} channels, but the backbone has learned from {channels}")
    height, width = pixels.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[:, :, top : top + side, left : left + side].contiguous()
    return _unnamed(square)


def _square(item: Any, decoding: Decoding) -> Tensor:
    if isinstance(item, Tensor):
        item = item.permute(1, 2, 0).numpy() if item.ndim == 3 else item.numpy()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in (1, 3)):
            raise ValueError(
                f"an image is uint8 [height, width] or with 1 or 3 channels, not {item.dtype} {list(item.shape)}"
            )
        item = Image.fromarray(item.squeeze(2) if item.ndim == 3 and item.shape[2] == 1 else item)
    if not isinstance(item, Image.Image):
        raise ValueError(
            f"{type(item).__name__} is no image: give paths, pictures of PIL, arrays or tensors, all alike"
        )
    return decoding.square(item)


def _unnamed(pixels: Tensor) -> InMemory:
    return InMemory(pixels, Names(map(str, range(len(pixels)))), None, (), _unmarked(pixels))


def _unmarked(images: object) -> str:
    """In place of a fingerprint, which nothing asks for here."""
    return f"{id(images):064x}"
