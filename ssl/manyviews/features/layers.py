"""Outputs of several layers of a backbone, in one pass."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyviews.encoder.backbone import summary
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import evaluation_mode
from manyviews.features.run_weights import digest_of
from manyviews.system.names import did_you_mean

BACKBONE, PROJECTOR, EMBEDDING = "backbone", "projector", "embedding"
HEADS = (PROJECTOR, EMBEDDING)
"""Layers of a run that are not modules of its backbone."""


class Layers(nn.Module):
    """A backbone whose layers are read by forward hooks while it encodes.

    `backbone` is the backbone's output, `projector` the projector's, `embedding` the input of the objective, and any
    other layer a module of the backbone by its name (`layer3`, `blocks.5`). Maps are averaged over their positions,
    tokens over the patches.

    `heads` are the modules of `projector` and `embedding`.

    Raises:
        ValueError: an unknown name, with the nearest ones, a repeated name, or a missing head.
    """

    def __init__(
        self, backbone: nn.Module, layers: Sequence[str], heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.heads, self.layers = backbone, nn.ModuleDict(heads or {}), tuple(layers)
        modules = {name: module for name, module in backbone.named_modules() if name}
        for name in self.layers:
            if name not in (BACKBONE, *HEADS) and name not in modules:
                stages = [module for module in modules if "." not in module][:12]
                hint = did_you_mean(name, [BACKBONE, *HEADS, *modules], 3, 0.5) or f"; it has {', '.join(stages)}"
                raise ValueError(f"layers: the backbone has no {name!r}{hint}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={','.join(self.layers)}: there are duplicates; name each layer once")
        for name in HEADS:
            if name in self.layers and name not in self.heads:
                raise ValueError(f"layers: there is no {name}; name backbone or a module of it")
        self._hooked = {name: modules[name] for name in self.layers if name not in (BACKBONE, *HEADS)}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> dict[str, Float[Tensor, "batch _"]]:
        """One vector per image and layer, in the order of the names.

        Raises:
            ValueError: a layer returns no tensor, or does not run exactly once.
        """
        outputs: dict[str, Tensor] = {}
        heads = [name for name in HEADS if name in self.layers]
        # The input of the projector is a second pass where it is not the backbone's output.
        has_summary = hasattr(self.backbone, "forward_summary")
        inputs = summary(self.backbone, images) if heads and has_summary else None
        if inputs is None or len(heads) < len(self.layers):
            self._encode(images, outputs)
            inputs = outputs[BACKBONE] if inputs is None else inputs
        for name in heads:
            outputs[name] = self.heads[name](inputs)
        return {name: outputs[name] for name in self.layers}

    def _encode(self, images: Tensor, outputs: dict[str, Tensor]) -> None:
        hooks = [
            module.register_forward_hook(partial(self._pool, outputs, name)) for name, module in self._hooked.items()
        ]
        try:
            features = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        for name in self._hooked:
            if name not in outputs:
                raise ValueError(f"layers: {name} does not run when the backbone encodes; name another")
        outputs[BACKBONE] = features

    def _pool(self, outputs: dict[str, Tensor], name: str, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layers: {name} returns {shape}, not vectors, tokens or maps; name another")
        if name in outputs:
            raise ValueError(f"layers: {name} runs several times when the backbone encodes; name another")
        if output.ndim == 4:
            channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
            output = output.mean((1, 2) if channels_last else (2, 3))
        elif output.ndim == 3:
            output = output[:, getattr(self.backbone, "num_prefix_tokens", 0) :].mean(1)
        else:
            # The next module may work in place.
            output = output.clone()
        outputs[name] = output

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


class OneLayer(nn.Module):
    """`Layers` of a single layer, with a tensor instead of a dictionary as output."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _"]:
        """One vector per image."""
        vectors: Tensor
        (vectors,) = self.layers(images).values()
        return vectors


def layers_of(
    opened: PretrainedBackbone, names: Sequence[str], *, untrained: bool = False
) -> tuple[Layers, dict[str, Any]]:
    """Layers of a pretrained backbone on the accelerator, and the provenance of the weights.

    Raises ValueError for an unknown layer, or a head that the run does not have.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backbone = opened.untrained() if untrained else opened.backbone()
    origin: dict[str, Any] = dict(opened.origin)
    if untrained:
        origin = {"untrained": True, "sha256": digest_of(backbone.state_dict())}
    heads = {} if untrained else {name: opened.head(name) for name in names if name in HEADS}
    origin |= {name: head.origin for name, head in heads.items()}
    layers = Layers(backbone, names, {name: head.module for name, head in heads.items()}).to(device)
    channels_last = opened.recipe is None or opened.recipe.train.channels_last
    return layers.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format), origin


def widths_of(layers: Layers, images: Float[Tensor, "1 channels height width"]) -> dict[str, int]:
    """The width of each layer, measured on one image."""
    with torch.inference_mode(), evaluation_mode(layers):
        return {name: rows.shape[1] for name, rows in layers(images.to(layers.device)).items()}
