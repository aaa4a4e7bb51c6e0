"""A linear metric: the Euclidean distance after a linear map of the features, with its file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyviews.config import Settings
from manyviews.system.files import parse_json
from manyviews.system.path_bytes import utf8_path
from manyviews.system.versions import versions

Report = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""
FORMAT = "linear metric"


@dataclass(frozen=True, eq=False)
class LinearMetric:
    """The distance ‖W (x − y)‖ between features: Euclidean after `transform`."""

    weights: Float[Tensor, "rank dim"]
    """W, float32."""
    centre: Float[Tensor, " dim"]
    """The mean of the features it was fitted on, float32: what is subtracted first changes no distance."""
    settings: Mapping[str, Any]
    """What it was fitted with, its name among them."""
    figures: Mapping[str, float | int]
    """What the fit has to say: shrinkage, iterations, objective …"""

    def transform(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images rank"]:
        """The features mapped, on their device: their Euclidean distances are the learned ones.

        float32, or float64 where the features are.

        Raises:
            ValueError: if the features are not as wide as those that the metric was fitted on.
        """
        if features.shape[1] != self.weights.shape[1]:
            raise ValueError(
                f"the features have {features.shape[1]} dimensions, the metric was fitted on {self.weights.shape[1]}; "
                "extract them with the same backbone"
            )
        features = features if features.dtype == torch.float64 else features.float()
        return (features - self.centre.to(features)) @ self.weights.to(features).T

    def save(self, file: Path) -> None:
        """Writes one safetensors file, with the settings, the figures and the versions as JSON in its header."""
        header = {"settings": dict(self.settings), "figures": dict(self.figures), "versions": versions()}
        tensors = {"weights": self.weights.cpu().contiguous(), "centre": self.centre.cpu().contiguous()}
        save_file(tensors, file, {"format": FORMAT} | {key: json.dumps(value) for key, value in header.items()})

    @staticmethod
    def load(file: Path) -> "LinearMetric":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not a linear metric.
        """
        try:
            with utf8_path(file) as path, safe_open(path, "pt") as opened:
                header = opened.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{file} holds no linear metric, or not from this project; fit it anew")
                weights, centre = (opened.get_tensor(key) for key in ("weights", "centre"))
        except SafetensorError as problem:
            raise ValueError(f"{file} cannot be read as safetensors ({problem}); fit the metric anew") from problem
        described = [parse_json(header.get(key, ""), f"the {key} of {file}") for key in ("settings", "figures")]
        if weights.ndim != 2 or centre.shape != weights.shape[1:] or not weights.is_floating_point():
            raise ValueError(f"{file} is damaged: {list(weights.shape)} weights around {list(centre.shape)}")
        return LinearMetric(weights, centre, *described)


class Labelled(NamedTuple):
    """The labelled features, centred."""

    features: Float[Tensor, "images dim"]
    """float64, with mean zero."""
    labels: Int[Tensor, " images"]
    """From 0, without gaps."""
    centre: Float[Tensor, " dim"]
    names: Int[Tensor, " classes"]
    """The labels as they were given."""

    @property
    def counts(self) -> Int[Tensor, " classes"]:
        """Images of each class."""
        return self.labels.bincount(minlength=len(self.names))

    @property
    def residuals(self) -> Float[Tensor, "images dim"]:
        """What remains of the features without the mean of their class."""
        sums = self.features.new_zeros(len(self.names), self.features.shape[1])
        means = sums.index_add_(0, self.labels, self.features) / self.counts[:, None]
        return self.features - means[self.labels]

    def metric(self, weights: Float[Tensor, "rank dim"], settings: Settings, **figures: float | int) -> LinearMetric:
        """The metric with these weights."""
        return LinearMetric(weights.float(), self.centre.float(), settings.model_dump(mode="json"), figures)


def labelled(features: Float[Tensor, "images dim"], labels: Int[Tensor, " images"]) -> Labelled:
    """The features that have a label, in float64 and centred, with their classes numbered anew.

    Raises:
        ValueError: if fewer than two are labelled, or some are not finite.
    """
    known = labels.to(features.device) >= 0
    chosen = features.detach()[known].double()
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} of {len(features)} images are labelled; a metric needs two at least")
    if not chosen.isfinite().all():
        raise ValueError("some features are not finite; extract them again in fp32, or train the backbone anew")
    names, numbers = labels.to(features.device)[known].unique(return_inverse=True)
    centre = chosen.mean(0)
    return Labelled(chosen - centre, numbers, centre, names)
