"""A backbone with what it takes to encode images by it: a run's, read back, or one that timm has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from manyviews.config import load
from manyviews.encoder.backbone import check_count, create_backbone, widths
from manyviews.encoder.encoder import Encoder
from manyviews.encoder.timm_format import HUB, LOCAL, SOURCES, Described, hub_folder, read_folder
from manyviews.features.run_weights import digest_of, newest_encoder, read_run_weights
from manyviews.recipe import Recipe
from manyviews.run.folder import CLASSIFIER, CONFIG
from manyviews.system.files import check_links, shown
from manyviews.system.names import closest, some
from manyviews.views import MEAN, STD, Interpolation, plain

SEED = 0
"""What random weights of a timm model follow from."""


class Head(NamedTuple):
    """What a run has beside its backbone, with its learned weights."""

    module: nn.Module
    origin: dict[str, Any]
    """Where its weights come from, as JSON values that change when they do."""


@dataclass(frozen=True, eq=False)
class PretrainedBackbone:
    """A backbone that images are encoded by; `open_model` and `open_run` make it."""

    name: str
    """The run folder or the timm name, as it was given."""
    model: str
    """What `create_backbone` makes it by, without a network: a timm name, or the folder that describes it."""
    channels: int
    """What the backbone sees: 1 for grey, 3 for colour."""
    size: int
    """Side of the square that the backbone sees, in pixels."""
    origin: Mapping[str, Any]
    """Where the weights come from, as JSON values that change when they do."""
    weights: Mapping[str, Tensor] = field(repr=False)
    """The backbone's."""
    mean: float | tuple[float, ...]
    """Of values in [0, 1], over all channels or of each: what the input is centred by."""
    std: float | tuple[float, ...]
    """Of values in [0, 1], over all channels or of each: what the input is divided by."""
    interpolation: Interpolation
    """How images of another size are resized."""
    folder: Path | None = None
    """The run folder; None for a timm model."""
    recipe: Recipe | None = None
    """The run's; None for a timm model."""
    step: int | None = None
    """Of the checkpoint that the weights are from; None where they were exported, or of a timm model."""
    encoder: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """The whole encoder of that checkpoint: the run may have put another one in its place meanwhile."""

    @property
    def transform(self) -> dict[str, Any]:
        """What is done to an image before it is encoded, as JSON values."""
        mean, std = (list(value) if isinstance(value, tuple) else value for value in (self.mean, self.std))
        described = {"channels": self.channels, "size": self.size, "mean": mean, "std": std}
        return described | {"interpolation": self.interpolation}

    def prepare(self, images: UInt8[Tensor, "batch _ height width"]) -> Float[Tensor, "batch channels size size"]:
        """The backbone's input, on the images' device; grey images are shown to a backbone for colour as grey."""
        prepared = plain(images, self.size, mean=self.mean, std=self.std, interpolation=self.interpolation)
        return prepared.expand(-1, self.channels, -1, -1)

    def blank(self) -> Float[Tensor, "1 channels size size"]:
        """One input of the backbone's kind, to see what it makes of such."""
        return torch.zeros(1, self.channels, self.size, self.size)

    def backbone(self) -> nn.Module:
        """The backbone with the weights that were opened."""
        # Whatever it began with is overwritten, and would perhaps have to be downloaded.
        backbone = self._create(self.model, pretrained=False)
        try:
            backbone.load_state_dict(dict(self.weights))
        except RuntimeError as problem:
            raise ValueError(
                f"{shown(self.name)}: the weights are not those of {shown(self.model)}: {shown(problem)}"
            ) from problem
        return backbone

    def untrained(self) -> nn.Module:
        """The backbone as it was before its first step; torch's global generator does not move."""
        if self.recipe is None:
            return self._create(self.model, pretrained=False)
        encoder = self.recipe.encoder
        if encoder.pretrained and encoder.name.startswith(SOURCES):
            raise ValueError(
                f"the run began with the weights of {shown(encoder.name)}, which lie outside of its folder and are not "
                "looked for; leave that baseline out with baselines=false"
            )
        return self._create(encoder.name, pretrained=encoder.pretrained)

    def check_count(self) -> None:
        """Refuses weights that are fewer than the model has, before it is built; raises ValueError."""
        held = sum(value.nbytes for value in self.weights.values())
        check_count(shown(self.name), held, partial(self._create, self.model, pretrained=False))

    def projector(self) -> Head:
        """The projector that the run's backbone was trained with, as `embedding` has it; collective."""
        encoder, origin = self._trained("projector")
        return Head(encoder.projector, origin)

    def embedding(self) -> Head:
        """What makes embeddings, which the objective compares, of what the projector reads; collective.

        That is the projector, and after it the predictor where there is one, from the checkpoint of the backbone's
        weights. Of a momentum twin there is nothing in it.

        Raises:
            ValueError: if this is no run, there is no checkpoint any more, or it is of another backbone than this.
        """
        encoder, origin = self._trained("embedding")
        return Head(nn.Sequential(encoder.projector, encoder.predictor), origin)

    def _create(self, name: str, *, pretrained: bool) -> nn.Module:
        drop_path = 0.0 if self.recipe is None else self.recipe.encoder.drop_path
        seed = SEED if self.recipe is None else self.recipe.seed
        return seeded_backbone(name, seed, self.channels, self.size, pretrained=pretrained, drop_path=drop_path)

    def _trained(self, layer: str) -> tuple[Encoder, dict[str, Any]]:
        """The whole encoder, and where its weights come from."""
        if self.folder is None or self.recipe is None:
            raise ValueError(f"{self.name} is a timm model, which has no {layer}; only a run has one: name backbone")
        state, origin = self.encoder, dict(self.origin)
        if state is None:
            state, origin = newest_encoder(self.folder, layer, self.weights, self.origin["file"])
        random = self.recipe.encoder.model_copy(update={"name": self.model, "pretrained": False})
        build = partial(random.build, channels=self.channels, size=self.size)
        check_count(shown(self.name), sum(value.nbytes for value in state.values()), build)
        with torch.random.fork_rng(devices=[]):
            encoder = build()
        try:
            encoder.load_state_dict(dict(state))
        except RuntimeError as problem:
            raise ValueError(
                f"{shown(self.name)}: the checkpoint's encoder is not the recipe's: {shown(problem)}"
            ) from problem
        return encoder, origin


def open_model(given: str, *, pretrained: bool | None = None, size: int | None = None) -> PretrainedBackbone:
    """A run by its folder, or a timm model by its name, `local-dir:FOLDER` and `hf-hub:NAME` included.

    Args:
        given: a run folder that exists is a run; anything else is a timm name.
        pretrained: for a timm name it must be said: true for its published weights, which may be downloaded; false
            for random ones, always the same. A run has learned its own weights.
        size: side of the square that the backbone sees, in pixels; by default what it was trained on.

    Raises:
        ValueError: for an unknown name or folder, without weights, for a `pretrained` that is missing or does not
            apply, and for a size that the backbone cannot take.
    """
    path = Path(given).expanduser()
    if (path / CONFIG).is_file():
        if pretrained is not None:
            raise ValueError(
                f"pretrained={str(pretrained).lower()} is for timm models; {given} is a run and has learned its own "
                "weights: leave it out"
            )
        return open_run(path, size=size)
    if not given.startswith(SOURCES) and not timm.is_model(given.partition(".")[0]):
        raise ValueError(_unknown(given, path))
    if pretrained is None:
        raise ValueError(
            f"{given} is a timm model: say pretrained=true for its published weights (downloaded where they are not "
            "kept yet) or pretrained=false for random ones"
        )
    return _open_timm(given, pretrained, size)


def open_run(folder: Path, *, size: int | None = None) -> PretrainedBackbone:
    """Reads a run's recipe and its backbone, or the newest checkpoint's if the run has not finished; collective.

    The run may be a stranger's: nothing is read from outside of its folder but what its recipe names as images, no
    network is used, and no code of it runs.

    Raises:
        ValueError: if this is no run folder, or one without any weights yet, or a file of it is damaged or a link out
            of it, or its backbone cannot take the size.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no run folder: it holds no {CONFIG}{_runs_nearby(folder)}")
    if (folder / CLASSIFIER).is_dir():
        raise ValueError(
            f"{folder} is a fine-tuned classifier, not a run; what is extracted or fine-tuned from it is "
            f"{LOCAL}{folder / CLASSIFIER}, with pretrained=true"
        )
    check_links(folder)
    recipe = load(Recipe, folder / CONFIG)
    if recipe.views.size is None:
        raise ValueError(f"{shown(folder / CONFIG)} is not a run's: its views.size is not said")
    read, side = read_run_weights(folder, recipe.encoder.name), size or recipe.views.size
    opened = PretrainedBackbone(
        name=str(folder),
        model=read.model,
        channels=read.channels,
        size=side,
        origin=read.origin,
        weights=read.weights,
        mean=MEAN,
        std=STD,
        interpolation="bicubic",
        folder=folder,
        recipe=recipe,
        step=read.step,
        encoder=read.encoder,
    )
    opened.check_count()
    if size is not None and size != recipe.views.size:
        try:
            widths(opened.backbone(), channels=read.channels, size=size)
        except (RuntimeError, ValueError) as problem:
            raise ValueError(
                f"size={size}: the backbone of {folder}, trained on {recipe.views.size} pixels, cannot take that; "
                "leave size out"
            ) from problem
    return opened


def _open_timm(name: str, pretrained: bool, size: int | None) -> PretrainedBackbone:
    if name.startswith(HUB) and not pretrained:
        raise ValueError(f"{shown(name)} is looked up on a network, which takes pretrained=true")
    model = f"{LOCAL}{hub_folder(name)}" if name.startswith(HUB) else name
    described = _description(model)
    channels, side = described.input_size[0], size or described.input_size[-1]
    backbone = seeded_backbone(model, SEED, channels, side, pretrained=pretrained)
    widths(backbone, channels=channels, size=side)
    weights = backbone.state_dict()
    return PretrainedBackbone(
        name=name,
        model=model,
        channels=channels,
        size=side,
        origin={"timm": name, "pretrained": pretrained, "sha256": digest_of(weights)},
        weights=weights,
        mean=described.mean,
        std=described.std,
        # What else timm names, it names for few models, and torch does not resize by it.
        interpolation="bilinear" if described.interpolation == "bilinear" else "bicubic",
    )


def seeded_backbone(name: str, seed: int, channels: int, size: int, **options: Any) -> nn.Module:
    """A backbone by `create_backbone` whose random weights follow from a seed; torch's global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_backbone(name, channels=channels, size=size, **options)


def _description(name: str) -> Described:
    """What timm tells of a model's input."""
    if name.startswith(LOCAL):
        return read_folder(Path(name.removeprefix(LOCAL)).expanduser()).described
    try:
        found = timm.get_pretrained_cfg(name)
    except Exception as problem:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        hint = f"; it has {', '.join(known)}" if known else ""
        raise ValueError(f"{shown(name)} cannot be had ({type(problem).__name__}: {shown(problem)}){hint}") from problem
    if found is None:
        raise ValueError(f"timm does not say what {shown(name)} takes as its input; choose another model")
    return Described.model_validate(found, from_attributes=True)


def _unknown(given: str, path: Path) -> str:
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return f"{given} is no run folder but a model in timm's format: write {LOCAL}{given}"
    near = closest(given, timm.list_models(), 3)
    hint = f"; timm has {' and '.join(near)}" if near else ""
    kind = f"a folder without {CONFIG}" if path.is_dir() else "a file" if path.exists() else "no folder that exists"
    return f"{given} is neither a run ({kind}) nor a model that timm knows{hint}{_runs_nearby(path)}"


def _runs_nearby(folder: Path) -> str:
    """What to say of run folders in and beside a folder, and in runs/, the most alike first."""
    places = [place for place in (folder, folder.parent, Path("runs")) if place.is_dir()]
    runs = [file.parent for place in places for file in sorted(place.glob(f"*/{CONFIG}"))]
    found = dict.fromkeys(str(run) for run in runs if not (run / CLASSIFIER).is_dir())
    alike = closest(str(folder), found, 3)
    nearby = list(dict.fromkeys([*alike, *found]))
    return f"; there are {some(nearby, 5)}" if nearby else ""
