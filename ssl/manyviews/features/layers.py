"""What several layers of a backbone make of images, in one pass."""

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
"""What a run has beside its backbone."""


class Layers(nn.Module):
    """A backbone whose layers are read by forward hooks while it encodes.

    `backbone` is what the backbone returns, `projector` what the projector makes of it, `embedding` what the objective
    compares, and any other layer a module of the backbone by its name (`layer3`, `blocks.5`). Maps are averaged over
    their positions, tokens over the patches.
    """

    def __init__(
        self, backbone: nn.Module, layers: Sequence[str], heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Names that are no layer are refused; `heads` are what projector and embedding are made by.

        Raises:
            ValueError: naming the nearest layers; or if a layer is named twice, or there is no such head.
        """
        super().__init__()
        self.backbone, self.heads, self.layers = backbone, nn.ModuleDict(heads or {}), tuple(layers)
        modules = {name: module for name, module in backbone.named_modules() if name}
        for name in self.layers:
            if name not in (BACKBONE, *HEADS) and name not in modules:
                raise ValueError(f"layers: the backbone has no {name!r}{_nearest(name, modules)}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={','.join(self.layers)}: one is named twice; name each once")
        for name in HEADS:
            if name in self.layers and name not in self.heads:
                raise ValueError(f"layers: there is no {name}; name backbone or a module of it")
        self._hooked = {name: modules[name] for name in self.layers if name not in (BACKBONE, *HEADS)}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> dict[str, Float[Tensor, "batch _"]]:
        """One vector per image by each layer's name, in the order of the names.

        Raises:
            ValueError: if a layer returns no tensor, or does not run exactly once for a batch.
        """
        found: dict[str, Tensor] = {}
        heads = [name for name in HEADS if name in self.layers]
        # A backbone that chooses what its projector reads is asked for it, which is a second pass.
        chooses = hasattr(self.backbone, "forward_summary")
        read = summary(self.backbone, images) if heads and chooses else None
        if read is None or len(heads) < len(self.layers):
            self._encode(images, found)
            read = found[BACKBONE] if read is None else read
        for name in heads:
            found[name] = self.heads[name](read)
        return {name: found[name] for name in self.layers}

    def _encode(self, images: Tensor, found: dict[str, Tensor]) -> None:
        hooks = [
            module.register_forward_hook(partial(self._take, found, name)) for name, module in self._hooked.items()
        ]
        try:
            features = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        for name in self._hooked:
            if name not in found:
                raise ValueError(f"layers: {name} does not run when the backbone encodes; name another")
        found[BACKBONE] = features

    def _take(self, found: dict[str, Tensor], name: str, _: nn.Module, __: Any, made: Any) -> None:
        if not isinstance(made, Tensor) or made.ndim not in (2, 3, 4):
            shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"layers: {name} returns {shape}, not vectors, tokens or maps; name another")
        if name in found:
            raise ValueError(f"layers: {name} runs several times when the backbone encodes; name another")
        if made.ndim == 4:
            channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
            made = made.mean((1, 2) if channels_last else (2, 3))
        elif made.ndim == 3:
            made = made[:, getattr(self.backbone, "num_prefix_tokens", 0) :].mean(1)
        else:
            # The next module may work in place.
            made = made.clone()
        found[name] = made

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(self.parameters()).device


class OneLayer(nn.Module):
    """The vectors of a single layer."""

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
    """Layers of a pretrained backbone on the device, and where the weights come from, as JSON values.

    Raises:
        ValueError: for a name that is no layer, or a projector or an embedding that cannot be had.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backbone = opened.untrained() if untrained else opened.backbone()
    origin: dict[str, Any] = dict(opened.origin)
    if untrained:
        origin = {"untrained": True, "sha256": digest_of(backbone.state_dict())}
    made = {PROJECTOR: opened.projector, EMBEDDING: opened.embedding}
    heads = {} if untrained else {name: made[name]() for name in names if name in made}
    origin |= {name: head.origin for name, head in heads.items()}
    layers = Layers(backbone, names, {name: head.module for name, head in heads.items()}).to(device)
    channels_last = opened.recipe is None or opened.recipe.train.channels_last
    return layers.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format), origin


def widths_of(layers: Layers, images: Float[Tensor, "1 channels height width"]) -> dict[str, int]:
    """The width of each layer, by a look at one image."""
    with torch.inference_mode(), evaluation_mode(layers):
        found = layers(images.to(layers.device))
        return {name: rows.shape[1] for name, rows in found.items()}


def _nearest(name: str, modules: dict[str, nn.Module]) -> str:
    stages = [module for module in modules if "." not in module]
    return did_you_mean(name, [BACKBONE, *HEADS, *modules], 3, 0.5) or f"; it has {', '.join(stages[:12])}"
