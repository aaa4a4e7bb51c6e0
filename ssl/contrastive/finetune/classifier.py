"""A classifier from a backbone: its head, which of its layers move, and how fast each of them does, by timm."""

from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import auto_group_layers
from torch import Tensor, nn

from contrastive.encoder import create_backbone
from contrastive.evaluate.linear import standard
from contrastive.evaluate.logistic import logistic_regression
from contrastive.opened import Opened

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)
"""Regularisations of the linear probe, strongest first."""
UNCHOSEN = 0.1
"""The one that is taken where no image is held out to choose by."""


def backbone_of(opened: Opened, *, scratch: bool, seed: int, drop_path: float) -> nn.Module:
    """The opened backbone with its weights, or with random ones that follow from the seed."""
    torch.manual_seed(seed)
    # Anew, and not `opened.backbone()`: a run may have trained with batch norms in parts, and with other options.
    model = create_backbone(opened.model, channels=opened.channels, size=opened.size, drop_path=drop_path)
    if not scratch:
        model.load_state_dict(dict(opened.weights))
    return model


def set_classes(model: nn.Module, classes: int) -> None:
    """Gives a backbone a random head.

    Raises:
        ValueError: if timm does not know how.
    """
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is None:
        raise ValueError(f"{type(model).__name__} has no reset_classifier, by which timm gives a head; use another")
    reset(classes)


def set_head(
    model: nn.Module,
    features: Float[Tensor, "images width"],
    labels: Int[Tensor, " images"],
    held_out: Float[Tensor, "held width"] | None,
    held_out_labels: Int[Tensor, " held"],
) -> None:
    """Makes the head the linear probe on the backbone's features, regularised as is best for the held-out ones.

    Fine-tuning under a random head first distorts the features that it was begun for (Kumar et al. 2022).

    Raises:
        ValueError: if the head is not one linear layer on these features.
    """
    head = _head(model)
    if not isinstance(head, nn.Linear) or head.in_features != features.shape[1]:
        raise ValueError(
            f"the head of {type(model).__name__} is not one linear layer on its {features.shape[1]} features, which a "
            "linear probe could take the place of; use mode=full"
        )
    scaled = standard(features)
    strengths = torch.tensor(STRENGTHS if held_out is not None else (UNCHOSEN,))
    fit = logistic_regression(scaled(features), labels, strengths, head.out_features)
    best = 0
    if held_out is not None:
        # Of equals the first, which is the strongest.
        best = int((fit.predict(scaled(held_out)) == held_out_labels).sum(1).argmax())
    # The standardisation goes into the layer.
    weights = fit.weights[best] * scaled.scale
    with torch.no_grad():
        head.weight.copy_(weights)
        head.bias.copy_(fit.biases[best] - weights @ scaled.mean)


def freeze(model: nn.Module, blocks: int) -> None:
    """Leaves only the head and the last blocks (timm's layers, norms with them) to be trained.

    Raises:
        ValueError: if the model has fewer layers.
    """
    layers = _layers(model)
    head = max(layers.values())
    if not 0 <= blocks <= head:
        raise ValueError(f"blocks={blocks}: {type(model).__name__} has {head} layers below its head; use at most that")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers[name] >= head - blocks)


def train_mode(model: nn.Module) -> None:
    """Training mode for what is trained; what is frozen is used as it was learned, its running statistics with it."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def create_optimiser(
    model: nn.Module, *, rate: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW with layer-wise rates, whose groups have the `peak_rate` that `optim.set_rate` follows."""
    optimiser = create_optimizer_v2(
        model, "adamw", lr=rate, weight_decay=weight_decay, layer_decay=layer_decay, fused=True
    )
    for group in optimiser.param_groups:
        group["peak_rate"] = rate * group["lr_scale"]
    return optimiser


def _head(model: nn.Module) -> Any:
    # Both typed as tensors by torch, whose modules may hold anything.
    find: Any = model.get_classifier
    return find()


def _layers(model: nn.Module) -> dict[str, int]:
    """The number of each parameter's layer, from the stem on; the head's is the last."""
    matcher: Any = getattr(model, "group_matcher", None)
    found: dict[str, int] = (
        auto_group_layers(model) if matcher is None else group_parameters(model, matcher(coarse=False), reverse=True)
    )
    return found
