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

Features = Float[Tensor, "images dim"]
ClassLabels = Int[Tensor, " images"]
Report = Callable[[str, int, int], None]
"""Called with the name of the method, the steps done, and the maximum number of steps."""
FORMAT = "linear metric"


@dataclass(frozen=True, eq=False)
class LinearMetric:
    """Distance ‖W (x − y)‖ between features: Euclidean after `transform`."""

    weights: Float[Tensor, "rank dim"]
    """W, float32."""
    centre: Float[Tensor, " dim"]
    """Mean of the features it was fitted on, float32; subtracting it changes no distance."""
    settings: Mapping[str, Any]
    """Settings of the fit, with its name."""
    figures: Mapping[str, float | int]
    """Results of the fit: shrinkage, iterations, objective …"""

    def transform(self, features: Features) -> Float[Tensor, "images rank"]:
        """Maps features, on their device: Euclidean distances of the result are the learned ones.

        float32, or float64 where the features are.

        Raises:
            ValueError: if the features have another number of dimensions than those that the metric was fitted on.
        """
        if features.shape[1] != self.weights.shape[1]:
            raise ValueError(
                f"the features have {features.shape[1]} dimensions, the metric was fitted on {self.weights.shape[1]}; "
                "extract them with the same backbone"
            )
        features = features if features.dtype == torch.float64 else features.float()
        return (features - self.centre.to(features)) @ self.weights.to(features).T

    def save(self, file: Path) -> None:
        """Writes a safetensors file with settings, figures and versions as JSON in its header."""
        header = {"settings": dict(self.settings), "figures": dict(self.figures), "versions": versions()}
        tensors = {"weights": self.weights.cpu().contiguous(), "centre": self.centre.cpu().contiguous()}
        save_file(tensors, file, {"format": FORMAT} | {key: json.dumps(value) for key, value in header.items()})

    @staticmethod
    def load(file: str | Path) -> "LinearMetric":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: if the file is not a linear metric.
        """
        try:
            with utf8_path(Path(file)) as path, safe_open(path, "pt") as content:
                header = content.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{file} holds no linear metric, or not from this project; fit it anew")
                weights, centre = (content.get_tensor(key) for key in ("weights", "centre"))
        except SafetensorError as problem:
            raise ValueError(f"{file} cannot be read as safetensors ({problem}); fit the metric anew") from problem
        settings, figures = (parse_json(header.get(key, ""), f"the {key} of {file}") for key in ("settings", "figures"))
        if weights.ndim != 2 or centre.shape != weights.shape[1:] or not weights.is_floating_point():
            raise ValueError(f"{file} is damaged: {list(weights.shape)} weights around {list(centre.shape)}")
        return LinearMetric(weights, centre, settings, figures)


class Labelled(NamedTuple):
    """Labelled features, centred."""

    features: Features
    """float64, with mean zero."""
    labels: ClassLabels
    """From 0, without gaps."""
    centre: Float[Tensor, " dim"]
    names: Int[Tensor, " classes"]
    """Original label of each class."""

    @property
    def counts(self) -> Int[Tensor, " classes"]:
        """Images of each class."""
        return self.labels.bincount(minlength=len(self.names))

    @property
    def residuals(self) -> Features:
        """The features minus the mean of their class."""
        sums = self.features.new_zeros(len(self.names), self.features.shape[1])
        means = sums.index_add_(0, self.labels, self.features) / self.counts[:, None]
        return self.features - means[self.labels]

    def metric(self, weights: Float[Tensor, "rank dim"], settings: Settings, **figures: float | int) -> LinearMetric:
        """The metric with these weights."""
        return LinearMetric(weights.float(), self.centre.float(), settings.model_dump(mode="json"), figures)


def labelled(features: Features, labels: ClassLabels, *, classes: int = 1) -> Labelled:
    """Selects the labelled features, in float64 and centred, with their classes renumbered.

    Raises:
        ValueError: if fewer than two are labelled, some are not finite, or there are fewer than `classes` classes.
    """
    known = labels.to(features.device) >= 0
    chosen = features.detach()[known].double()
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} of {len(features)} images are labelled; a metric needs two at least")
    if not chosen.isfinite().all():
        raise ValueError("some features are not finite; extract them again in fp32, or train the backbone anew")
    names, numbers = labels.to(features.device)[known].unique(return_inverse=True)
    if len(names) < classes:
        raise ValueError(
            f"all labelled images are of class {int(names[0])}: no images to push apart; give images of two classes"
        )
    centre = chosen.mean(0)
    return Labelled(chosen - centre, numbers, centre, names)
