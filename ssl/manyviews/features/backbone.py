"""A pretrained backbone and its preprocessing, loaded from a run folder or from timm."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyviews.config import load
from manyviews.encoder.backbone import check_count, create_backbone, description_of, widths
from manyviews.encoder.timm_format import LOCAL, SOURCES, Described, local_name
from manyviews.features.run_weights import digest_of, newest_encoder, read_run_weights
from manyviews.recipe import Recipe
from manyviews.run.folder import CLASSIFIER, CONFIG
from manyviews.system.files import check_links, shown
from manyviews.system.names import closest, some
from manyviews.views import StandardView, standard_view

SEED = 0
"""Seed of the random weights of a timm model."""
CROP_PCT = 0.875
"""timm's, for a model that names none."""


class Head(NamedTuple):
    """A run's projector, or projector and predictor, with trained weights."""

    module: nn.Module
    origin: dict[str, Any]
    """Provenance of the weights, as JSON values that change with them."""


@dataclass(frozen=True, eq=False)
class PretrainedBackbone:
    """A pretrained backbone and its preprocessing; `open_model` and `open_run` make it."""

    name: str
    """The run folder or the timm name, as the user wrote it."""
    model: str
    """Name for `create_backbone` that needs no network: a timm name or local-dir:FOLDER."""
    view: StandardView
    """The preprocessing, from pictures to the input."""
    origin: Mapping[str, Any]
    """Provenance of the weights, as JSON values that change with them."""
    weights: Mapping[str, Tensor] = field(repr=False)
    folder: Path | None = None
    """The run folder; None for a timm model, as are the recipe, step and encoder."""
    recipe: Recipe | None = None
    step: int | None = None
    """Step of the checkpoint that the weights are from; None if they were exported."""
    encoder: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """The whole encoder of that checkpoint, which the run may have replaced since."""

    @property
    def channels(self) -> int:
        """Input channels, 1 or 3."""
        return self.view.channels

    @property
    def size(self) -> int:
        """Side of the input square, in pixels."""
        return self.view.size

    def blank(self) -> Float[Tensor, "1 channels size size"]:
        """An input of zeros, to measure the widths of outputs."""
        return torch.zeros(1, self.channels, self.size, self.size)

    def backbone(self) -> nn.Module:
        """Builds the backbone with its pretrained weights."""
        # Published weights would be overwritten, and perhaps downloaded first.
        backbone = self._create(self.model, pretrained=False)
        try:
            backbone.load_state_dict(dict(self.weights))
        except RuntimeError as problem:
            raise ValueError(
                f"{shown(self.name)}: the weights are not those of {shown(self.model)}: {shown(problem)}"
            ) from problem
        return backbone

    def untrained(self) -> nn.Module:
        """Builds the backbone as it was before its first step; torch's global generator is not used."""
        if self.recipe is None:
            return self._create(self.model, pretrained=False)
        encoder = self.recipe.encoder
        if encoder.pretrained and encoder.name.startswith(SOURCES):
            raise ValueError(
                f"the run started from the weights of {shown(encoder.name)}, which are outside of its folder and not "
                "read; leave that baseline out with baselines=false"
            )
        return self._create(encoder.name, pretrained=encoder.pretrained)

    def head(self, layer: str) -> Head:
        """The run's projector or, for `embedding`, projector and predictor; collective.

        Raises:
            ValueError: this is not a run, or it has no checkpoint, or only one of other weights.
        """
        if self.folder is None or self.recipe is None:
            raise ValueError(f"{self.name} is a timm model, which has no {layer}; only a run has one: use backbone")
        state, origin = self.encoder, dict(self.origin)
        if state is None:
            state, origin = newest_encoder(self.folder, layer, self.weights, self.origin["file"])
        # Patches' context is no layer, and may depend on the size.
        state = {key: value for key, value in state.items() if not key.startswith("context.")}
        random = self.recipe.encoder.model_copy(update={"name": self.model, "pretrained": False, "context": None})
        build = partial(random.build, channels=self.channels, size=self.size)
        check_count(shown(self.name), _bytes(state), build)
        with torch.random.fork_rng(devices=[]):
            encoder = build()
        try:
            encoder.load_state_dict(dict(state))
        except RuntimeError as problem:
            raise ValueError(
                f"{shown(self.name)}: the checkpoint's encoder is not the recipe's: {shown(problem)}"
            ) from problem
        projector, predictor = encoder.projector, encoder.predictor
        return Head(projector if layer == "projector" else nn.Sequential(projector, predictor), origin)

    def _create(self, name: str, *, pretrained: bool) -> nn.Module:
        drop_path = 0.0 if self.recipe is None else self.recipe.encoder.drop_path
        seed = SEED if self.recipe is None else self.recipe.seed
        return seeded_backbone(name, seed, self.channels, self.size, pretrained=pretrained, drop_path=drop_path)


def open_model(name: str, *, pretrained: bool | None = None, size: int | None = None) -> PretrainedBackbone:
    """Opens a run by its folder, or a timm model by name, local-dir:FOLDER or hf-hub:NAME.

    Examples:
        >>> open_model("light_resnet", pretrained=False).size
        32

    Args:
        name: a folder with a config.yaml is a run; anything else is a timm name.
        pretrained: required for a timm model: true for its published weights, which may be downloaded; false for
            random ones, always the same.
        size: side of the input square in pixels; by default that of training.

    Raises:
        ValueError: unknown name or folder, no weights, `pretrained` missing or given for a run, or a size that the
            backbone cannot take.
    """
    path = Path(name).expanduser()
    if (path / CONFIG).is_file():
        if pretrained is not None:
            raise ValueError(
                f"pretrained={str(pretrained).lower()} is for timm models; {name} is a run with weights of "
                "its own: leave it out"
            )
        return open_run(path, size=size)
    if not name.startswith(SOURCES) and not timm.is_model(name.partition(".")[0]):
        raise ValueError(_unknown(name, path))
    if pretrained is None:
        raise ValueError(
            f"{name} is a timm model: set pretrained=true for its published weights (downloaded unless they are in the "
            "cache) or pretrained=false for random ones"
        )
    return _open_timm(name, pretrained, size)


def open_run(folder: Path, *, size: int | None = None) -> PretrainedBackbone:
    """Opens a run: its exported backbone, or else that of the newest checkpoint; collective.

    The run may be a stranger's: only its folder and the images that its recipe names are read, no network is used, and
    no code of it runs.

    Raises:
        ValueError: not a run folder, no weights yet, a damaged file or a link out of the folder, or a size that the
            backbone cannot take.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no run folder: it has no {CONFIG}{_runs_nearby(folder)}")
    if (folder / CLASSIFIER).is_dir():
        raise ValueError(
            f"{folder} is a fine-tuned classifier, not a run; to extract or fine-tune from it, use "
            f"{LOCAL}{folder / CLASSIFIER} with pretrained=true"
        )
    check_links(folder)
    recipe = load(Recipe, folder / CONFIG)
    if recipe.views.size is None:
        raise ValueError(f"{shown(folder / CONFIG)} is not a run's: it has no views.size")
    read = read_run_weights(folder, recipe.encoder.name)
    view = standard_view(recipe.views, read.channels)
    opened = PretrainedBackbone(
        name=str(folder),
        model=read.model,
        view=replace(view, size=size or view.size),
        origin=read.origin,
        weights=read.weights,
        folder=folder,
        recipe=recipe,
        step=read.step,
        encoder=read.encoder,
    )
    build = partial(opened._create, opened.model, pretrained=False)
    check_count(shown(opened.name), _bytes(opened.weights), build)
    if size is not None and size != recipe.views.size:
        try:
            widths(opened.backbone(), channels=opened.channels, size=size)
        except (RuntimeError, ValueError) as problem:
            raise ValueError(
                f"size={size}: the backbone of {folder}, trained on {recipe.views.size} pixels, cannot take that; "
                "leave size out"
            ) from problem
    return opened


def _open_timm(name: str, pretrained: bool, size: int | None) -> PretrainedBackbone:
    model = local_name(name, pretrained=pretrained)
    described = description_of(model)
    channels, side = described.input_size[0], size or described.input_size[-1]
    backbone = seeded_backbone(model, SEED, channels, side, pretrained=pretrained)
    widths(backbone, channels=channels, size=side)
    weights = backbone.state_dict()
    return PretrainedBackbone(
        name=name,
        model=model,
        view=view_of(described, side),
        origin={"timm": name, "pretrained": pretrained, "sha256": digest_of(weights)},
        weights=weights,
    )


def view_of(described: Described, size: int) -> StandardView:
    """The view that timm's transform makes for evaluation, with a side of `size` pixels.

    timm has a few models whose pictures are resized with other filters, or padded: their view is bicubic, or shows the
    whole shorter side.
    """
    return StandardView(
        size,
        described.input_size[0],
        described.mean,
        described.std,
        interpolation="bilinear" if described.interpolation == "bilinear" else "bicubic",
        crop_pct=min(described.crop_pct or CROP_PCT, 1.0),
        crop_mode="squash" if described.crop_mode == "squash" else "center",
    )


def seeded_backbone(name: str, seed: int, channels: int, size: int, **options: Any) -> nn.Module:
    """`create_backbone` with random weights from a seed; torch's global generator is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_backbone(name, channels=channels, size=size, **options)


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in weights.values())


def _unknown(name: str, path: Path) -> str:
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return f"{name} is no run folder but a model in timm's format: write {LOCAL}{name}"
    near = closest(name, timm.list_models(), 3)
    hint = f"; timm has {' and '.join(near)}" if near else ""
    kind = f"a folder without {CONFIG}" if path.is_dir() else "a file" if path.exists() else "no folder that exists"
    return f"{name} is neither a run ({kind}) nor a model of timm{hint}{_runs_nearby(path)}"


def _runs_nearby(folder: Path) -> str:
    """End of a message with run folders near a folder and in runs/, similar names first."""
    parents = [parent for parent in (folder, folder.parent, Path("runs")) if parent.is_dir()]
    runs = [file.parent for parent in parents for file in sorted(parent.glob(f"*/{CONFIG}"))]
    names = [str(run) for run in runs if not (run / CLASSIFIER).is_dir()]
    nearby = list(dict.fromkeys([*closest(str(folder), dict.fromkeys(names), 3), *names]))
    return f"; there are {some(nearby, 5)}" if nearby else ""
