"""A classifier from a backbone: head, trainable layers and layer-wise learning rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.models import group_parameters
from timm.optim import auto_group_layers, create_optimizer_v2
from torch import Tensor, nn

from manyviews.evaluators.linear import NEAR, UNCHOSEN, standard
from manyviews.evaluators.logistic import MOST_LOGITS, logistic_regression, principal_axes
from manyviews.features.placing import placed

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)
"""Regularisations of the linear probe, strongest first."""


def set_classes(model: nn.Module, classes: int) -> None:
    """Adds a random head; raises ValueError if the model has no reset_classifier."""
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is None:
        raise ValueError(f"{type(model).__name__} has no reset_classifier, by which timm gives a head; use another")
    reset(classes)


class Probe(NamedTuple):
    """A linear classifier on a backbone's features, which are not standardised."""

    weights: Float[Tensor, "classes width"]
    biases: Float[Tensor, " classes"]
    regularisation: float
    held_out: float | None
    """Accuracy on the held-out images; None without any."""

    def logits(self, features: Float[Tensor, "images width"]) -> Float[Tensor, "images classes"]:
        """Logits of features."""
        return features @ self.weights.T + self.biases


def fit_probe(
    features: Float[Tensor, "images width"],
    labels: Int[Tensor, " images"],
    held_out: Float[Tensor, "held width"] | None,
    held_out_labels: Int[Tensor, " held"],
    classes: int,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Probe:
    """Fits logistic regression, with the best regularisation on the held-out features.

    Without held-out images it is `UNCHOSEN`. Of equally good ones the strongest is chosen. If many images and classes
    make each fit slow, they are fitted in turn, the strongest first, until two in a row do not improve.
    """
    strengths = torch.tensor(STRENGTHS if held_out is not None else (UNCHOSEN,), dtype=torch.float64)
    features = placed(features, 3, 20 * MOST_LOGITS)
    scaled = standard(features)
    inputs = scaled(features)
    tests = scaled(held_out.to(features.device)) if held_out is not None else None
    numbers = len(inputs) * classes * len(strengths)
    parts = strengths.split(1 if numbers > MOST_LOGITS else len(strengths))
    axes, start, best, since = principal_axes(inputs), None, None, 0
    for done, part in enumerate(parts, start=1):
        fit = logistic_regression(
            inputs, labels, part, classes, start=start, axes=axes, tolerance=NEAR if len(parts) > 1 else 1e-5
        )
        hits = (fit.predict(tests).cpu() == held_out_labels).sum(1) if tests is not None else torch.zeros(len(part))
        chosen = int(hits.argmax())
        since += 1
        if best is None or hits[chosen] > best[0]:
            best, since = (hits[chosen], part[chosen].item(), fit.weights[chosen], fit.biases[chosen]), 0
        report(done, len(parts))
        start = fit if len(part) == 1 else None
        if since >= 2:
            break
    assert best is not None
    right, strength, weights, biases = best
    accuracy = right.item() / len(held_out_labels) if tests is not None else None
    # The standardisation is folded into the layer.
    weights = weights * scaled.scale
    return Probe(weights.cpu(), (biases - weights @ scaled.mean).cpu(), strength, accuracy)


def set_head(model: nn.Module, probe: Probe) -> None:
    """Sets the head to a linear probe, which distorts features less (Kumar et al. 2022).

    Raises:
        ValueError: if the head is not one linear layer on these features.
    """
    get_classifier: Any = model.get_classifier
    head, width = get_classifier(), probe.weights.shape[1]
    if not isinstance(head, nn.Linear) or head.in_features != width:
        raise ValueError(
            f"the head of {type(model).__name__} is not one linear layer on its {width} features, which a linear "
            "probe could replace; use mode=full"
        )
    with torch.no_grad():
        head.weight.copy_(probe.weights)
        head.bias.copy_(probe.biases)


def freeze(model: nn.Module, blocks: int) -> None:
    """Freezes all but the head and the last `blocks` layers; raises ValueError for too many."""
    layers = _layers(model)
    head = max(layers.values())
    if not 0 <= blocks <= head:
        raise ValueError(f"blocks={blocks}: {type(model).__name__} has {head} layers below its head; use at most that")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers[name] >= head - blocks)


def train_mode(model: nn.Module) -> None:
    """Sets trainable modules to training mode, frozen ones to evaluation mode."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def create_optimiser(
    model: nn.Module, *, rate: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW with layer-wise learning rates, and a `peak_rate` for `optim.set_rate`."""
    optimiser = create_optimizer_v2(
        model, "adamw", lr=rate, weight_decay=weight_decay, layer_decay=layer_decay, fused=True
    )
    for group in optimiser.param_groups:
        group["peak_rate"] = rate * group["lr_scale"]
    return optimiser


def _layers(model: nn.Module) -> dict[str, int]:
    matcher: Any = getattr(model, "group_matcher", None)
    layers: dict[str, int] = (
        auto_group_layers(model) if matcher is None else group_parameters(model, matcher(coarse=False), reverse=True)
    )
    return layers
