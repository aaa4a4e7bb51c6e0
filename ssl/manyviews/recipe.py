"""The settings of a whole run, and the recipes in `configs/`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from manyviews.config import Settings, as_list, vocabulary
from manyviews.data import Data, Sample, shorthand
from manyviews.data.labels import ValuesSource
from manyviews.encoder.encoder import EncoderSettings
from manyviews.objectives import OBJECTIVES, InBatch, Objective
from manyviews.optim import OptimSettings
from manyviews.system.names import did_you_mean
from manyviews.views import ViewsSettings

QUICKSTART = "quickstart"


class TrainSettings(Settings):
    """Budget, batch, device and logging of training."""

    epochs: float = Field(100, gt=0, le=1_000_000)
    """Passes over the images, or with data.relations over the relations; a part of one is allowed."""
    minutes: float | None = Field(None, gt=0, le=10_000_000)
    """Wall-clock minutes of training, instead of epochs; the schedule then follows the clock."""
    batch_size: int = Field(256, ge=2, le=1_048_576)
    """Images per step over all processes together. Those of one step are negatives of each other in an in-batch loss,
    whatever the chunks and the processes."""
    chunk: Annotated[int, Field(ge=1, le=1_048_576)] | Literal["auto"] | None = None
    """Images per forward pass on each process, where a batch is beyond its memory: the same gradient for one more
    forward pass (GradCache), with all negatives of the whole batch. Batch norms then see one chunk at a time. auto, on
    GPUs: the most that fit, found by trying before the run."""
    images_per_class: int | None = Field(None, ge=1, le=1_048_576)
    """Images of each class in a batch, which then has batch_size / images_per_class different classes (with
    ids=labels); null: images as they come. An epoch is as many batches as can be filled so."""
    items_per_query: int | None = Field(None, ge=1, le=1_048_575)
    """Items of a ranked list of data.relations in a batch, drawn anew in each epoch; null: those of the longest list,
    and at most 15."""
    unrelated: int = Field(0, ge=0, le=1_048_576)
    """Images of each batch that are in no relation of data.relations, drawn from all of these: with
    unrelated=negatives they are negatives of every query."""
    keep_views: bool = False
    """Keep the views of all chunks for the second pass, instead of making them again with less memory."""
    drop_last: bool = True
    """Leave out the rest of an epoch that does not fill a batch, another one each time. If false it is a smaller batch,
    unless it has fewer than 2 images for each process (and for each part of a split batch norm)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder; auto: bf16 where the device is built for it. Objectives are always fp32."""
    channels_last: bool = True
    """Memory layout of the encoder: channels last is the faster one for convolutions on most devices."""
    compile: bool = False
    """Compile the encoder with torch.compile: a slow first step, then faster ones."""
    deterministic: bool = False
    """On a GPU, take deterministic algorithms, which are slower: without them a resume is not bit for bit there."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Processes or threads that decode images, for each process; null: 2, or with a GPU its share of the cores."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of each process on the CPU; null: the cores divided among the processes."""
    log_every: int = Field(10, ge=1, le=1_000_000_000)
    """Steps between two lines of metrics."""
    monitor: int = Field(4, ge=0, le=10_000)
    """How many times in the run kNN is measured on held-out labels, where there are labels; 0: never."""
    save_minutes: float = Field(5, gt=0, le=10_000_000)
    """Minutes between two checkpoints."""
    keep: int = Field(2, ge=1, le=100_000)
    """Checkpoints that stay; the older ones go after a new one is safe."""
    keep_best: bool = True
    """Save, and keep beside the newest ones, the checkpoint with the highest kNN accuracy of `monitor`."""
    preview: int = Field(8, ge=0, le=256)
    """Images in the picture of originals and their views that is made before the first step; 0: none."""

    @property
    def part(self) -> int | None:
        """`chunk` as a number; null too where it is to be found."""
        return None if self.chunk == "auto" else self.chunk

    def steps(self, steps_per_epoch: int) -> int:
        """The number of steps of `epochs`."""
        return max(1, round(self.epochs * steps_per_epoch))


class Recipe(Settings):
    """One run, from images to backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    output: str | None = None
    """The run folder; by default runs/ and the recipe's name."""
    resume: bool = False
    """Resume from the newest valid checkpoint in the run folder, bit for bit; on a GPU with train.deterministic."""
    elastic: bool = False
    """Resume a run on another number of processes than its checkpoint was written by: from the same sample and
    with the same global batch, but not bit for bit. The rows of a bank or queue are redistributed; a queue with
    per_process=true, whose length would change, is refused."""
    extend: bool = False
    """With resume=true, continue with another train.epochs or train.minutes than before, even if the run is finished:
    from there on the schedule is that of the new budget."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Weights, order, views and noise all follow from it."""
    data: Data = Sample()
    """The images; data=/some/folder is short for data.name=folder data.path=/some/folder."""
    views: ViewsSettings = ViewsSettings()
    encoder: EncoderSettings = EncoderSettings()
    objective: Objective = InBatch()
    """What is learned from."""
    ids: Literal["images", "labels"] = "images"
    """What makes two embeddings positives of each other: views of the same image, or images of the same label. An image
    without a label is then alone in its class."""
    values: ValuesSource | None = None
    """Continuous labels, for objectives that compare distances with theirs: pixels (each image's 7 × 7 thumbnail),
    labels (its thumbnail and its class), or a file of numbers: .npy with a row for each training image, or .csv with
    their names (name, numbers in each line)."""
    unrelated: Literal["ignored", "negatives"] = "ignored"
    """With data.relations, what the other images of a batch are, those without a relation to the query: nothing, or
    negatives (items of relevance 0)."""
    unseen: Annotated[tuple[int | str, ...], BeforeValidator(as_list)] = ()
    """Classes, by name or by number, whose images are left out of training: retrieval is then measured on them."""
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()

    @property
    def keys(self) -> int | None:
        """Number of views that embeddings are compared with, without local ones; None: all."""
        return self.views.num_views if self.views.local else None

    @model_validator(mode="after")
    def _settings_go_together(self) -> "Recipe":
        if self.extend and not self.resume:
            raise ValueError("extend=true continues a run: add resume=true, or leave it out")
        name, reason, use = self.objective.name, self.objective.traits.images_only, self.objective.traits.uses_values
        if self.ids == "labels" and reason is not None:
            raise ValueError(
                f"ids=labels does not go with objective={name}, {reason}; for positives of the same label use "
                "objective=supervised (in the batch) or objective=queue (in the last batches too), or set ids=images"
            )
        if use == "always" and self.values is None:
            raise ValueError(
                f"objective={name} compares distances with those of continuous labels, and there are none; set "
                "values=pixels, values=labels, or values=FILE with numbers for each image"
            )
        if self.unrelated == "negatives" and self.data.relations is None:
            raise ValueError(
                "unrelated=negatives is for batches of relations; name their file with data.relations=FILE, or leave "
                "it out"
            )
        if self.train.unrelated and self.unrelated == "ignored":
            raise ValueError(
                f"train.unrelated={self.train.unrelated} images of a batch would be ignored; set unrelated=negatives, "
                "or leave it out"
            )
        if self.train.items_per_query is not None and self.data.relations is None:
            raise ValueError(
                f"train.items_per_query={self.train.items_per_query} is for ranked lists; name their file with "
                "data.relations=FILE, or leave it out"
            )
        if self.values is not None and use is None:
            able = (f"objective={other}" for other, settings in OBJECTIVES.items() if settings().traits.uses_values)
            raise ValueError(
                f"values={self.values} is not for objective={name}, which compares no continuous labels; leave it "
                f"out, or use {' or '.join(able)}"
            )
        if self.values is not None and self.ids == "labels":
            raise ValueError(
                f"values={self.values} belong to images, and with ids=labels the objective gets classes alone; use "
                "ids=images, and values=labels to have classes among the values"
            )
        return self

    @model_validator(mode="after")
    def _classes_in_a_batch(self) -> "Recipe":
        size, number = self.train.batch_size, self.train.images_per_class
        if number is None:
            return self
        if self.ids != "labels":
            raise ValueError(f"train.images_per_class={number} needs classes; set ids=labels, or leave it out")
        if not self.train.drop_last:
            raise ValueError(
                f"train.images_per_class={number} makes whole batches only; leave train.drop_last=false out"
            )
        if size % number or size < number:
            nearest = max(round(size / number), 1) * number
            raise ValueError(
                f"train.batch_size={size} is no multiple of train.images_per_class={number}; use {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _patches_to_predict(self) -> "Recipe":
        name, context, patches = self.objective.name, self.encoder.context, self.objective.traits.predicts_patches
        if patches and context is None:
            raise ValueError(
                f"objective={name} predicts patches from the context of those above, and the encoder has none; begin "
                "with recipe cpc, or set encoder.context=gru, mean or attention"
            )
        if context is not None and not patches:
            raise ValueError(
                f"encoder.context={context.name} cuts views into patches, and objective={name} compares whole views; "
                "set objective=cpc, or encoder.context=null"
            )
        if patches and self.views.local:
            raise ValueError(
                f"views.local={self.views.local}, but objective={name} predicts the patches of one view; set "
                "views.local=0"
            )
        return self

    @model_validator(mode="after")
    def _views_to_contrast(self) -> "Recipe":
        # Items of lists are positives without another view; whether a file holds sets instead is not known yet.
        if self.data.relations is None or not self.objective.traits.relations:
            self.check_views()
        if self.views.local and self.objective.traits.pairs_off:
            raise ValueError(
                f"views.local={self.views.local}, but objective={self.objective.name} compares pairs, in which each "
                "view has one partner; set views.local=0, or use objective=in_batch"
            )
        return self

    def check_views(self) -> None:
        """Raises ValueError for another number of views than the objective contrasts."""
        fewest, most, number = (
            self.objective.traits.fewest_views,
            self.objective.traits.most_views,
            self.views.num_views,
        )
        name, patches = self.objective.name, self.objective.traits.predicts_patches
        in_batch = self.objective.traits.negatives_from == "batch" and not patches
        if in_batch and self.ids == "images" and self.values is None:
            # In the batch, an image has no positives but its own views.
            fewest = max(fewest, 2)
        if number < fewest or (most is not None and number > most):
            bound = f"{fewest} view{'s' if fewest > 1 else ''}" if fewest == most else f"at least {fewest} views"
            raise ValueError(
                f"views.num_views={number}, but objective={name} contrasts {bound} of each image; "
                f"set views.num_views={fewest}"
            )


def folder() -> Path:
    """The folder of recipes: in the package in a wheel, at the root in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """The names of the recipes, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def find(recipe: str) -> Path:
    """The file of a recipe by its name or path; raises ValueError with the similar names.

    Examples:
        >>> find("simclr").name
        'simclr.yaml'
    """
    named = folder() / f"{recipe}.yaml"
    if named.is_file():
        return named
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    name = vocabulary.plain(recipe)
    hint = did_you_mean(vocabulary.RECIPES.get(name, name), names(), 1, 0.5)
    raise ValueError(f"{recipe!r} is neither a recipe ({', '.join(names())}) nor a file that exists{hint}")
