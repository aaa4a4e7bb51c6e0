"""Self-supervised contrastive pretraining: from a folder of images to a backbone.

The functions take the keys of the command line, such as `manyviews pretrain simclr data=photos train.epochs=10`.

Examples:
    >>> run = manyviews.pretrain("simclr", data="photos", train={"epochs": 10})  # doctest: +SKIP
    >>> run.evaluate()  # doctest: +SKIP
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Registers the small-image backbones for `timm.create_model`.
from manyviews.encoder import small_models as small_models

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from manyviews.data import of_dataset as of_dataset
    from manyviews.evaluation.verify import Verdict
    from manyviews.features.transformer import Features as Features
    from manyviews.recipe import Recipe

# Imports within functions: `import manyviews` stays cheap, also for the processes that only decode images.


def pretrain(
    recipe: str | PathLike[str] = "quickstart",
    *,
    on_metrics: Callable[[Mapping[str, float]], object] | None = None,
    **settings: Any,
) -> "Run":
    """Pretrains a recipe, by its name or file, and returns the run.

    Keywords are the keys of the command line, nested ones as dictionaries: `objective="queue"`,
    `optim={"rate": 0.1}`, `resume=True`. `data` may also be a torch dataset, as in `of_dataset`, and `objective` the
    settings of an objective of one's own. `on_metrics` is called on rank 0 with each line of metrics.

    Raises:
        ValueError: if recipe, settings, images or launch are invalid, before anything is written.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint is saved; call again with `resume=True` to continue.

    Examples:
        >>> run = pretrain(data="photos", output="runs/photos", train={"epochs": 10})  # doctest: +SKIP
    """
    from manyviews.cli import run_pretrain

    with _interruptible():
        return Run(run_pretrain([str(recipe), *_args(settings)], on_metrics=on_metrics))


def evaluate(run: "str | PathLike[str] | Run", *others: "str | PathLike[str] | Run", **settings: Any) -> "Run":
    """Evaluates a run beside its baselines, or compares several runs; returns the (first) run.

    Keywords are the keys of `manyviews evaluate`; `Run.scores` has the results.

    Raises:
        ValueError: if a run cannot be read, or nothing can be measured.

    Examples:
        >>> evaluate("runs/photos", tasks=["knn", "linear"]).scores()  # doctest: +SKIP
    """
    from manyviews.cli import run_evaluate

    folders = [str(one.folder if isinstance(one, Run) else one) for one in (run, *others)]
    with _interruptible():
        run_evaluate([*folders, *_args(settings)])
    return Run(folders[0])


def verify(run: "str | PathLike[str] | Run", first: Any, second: Any, **settings: Any) -> "Verdict":
    """Compares two images by a run, and judges by its verification whether they are of one class.

    Images are paths, PIL images or uint8 arrays; keywords are the keys of `manyviews verify`. The result is true if
    they are judged the same; its `missing` says why there is no threshold.

    Raises:
        ValueError: if the run has no weights, or an image cannot be read.

    Examples:
        >>> verdict = verify("runs/photos", "a.jpg", "b.jpg")  # doctest: +SKIP
        >>> verdict.same, verdict.value, verdict.false_accepts  # doctest: +SKIP
        (True, 0.83, 0.003)
    """
    from manyviews.config import load
    from manyviews.evaluation.verify import VerifySettings, verify_images

    folder = run.folder if isinstance(run, Run) else Path(run).expanduser()
    return verify_images(folder, first, second, load(VerifySettings, None, _args(settings)))


def extract(model: "str | PathLike[str] | Run", **settings: Any) -> Path:
    """Writes one row of features per image into a folder, and returns the folder.

    `model` is a run or a timm name; keywords are the keys of `manyviews extract`.

    Raises:
        ValueError: if model, settings or images are invalid.

    Examples:
        >>> folder = extract("resnet18", pretrained=False, data="photos", output="features")  # doctest: +SKIP
        >>> np.load(folder / "backbone.npy", mmap_mode="r")  # doctest: +SKIP
    """
    from manyviews.cli import run_extract

    with _interruptible():
        return run_extract([str(model.folder if isinstance(model, Run) else model), *_args(settings)])


def finetune(
    model: "str | PathLike[str] | Run",
    *,
    on_metrics: Callable[[Mapping[str, float]], object] | None = None,
    **settings: Any,
) -> Path:
    """Trains a classifier from a backbone, and returns its folder.

    `model` is a run or a timm name; keywords are the keys of `manyviews finetune`. The classifier is
    `timm.create_model(f"local-dir:{folder}/classifier", pretrained=True)`.

    Raises:
        ValueError: if model, settings or labels are invalid, before anything is written.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint is saved; call again with `resume=True` to continue.

    Examples:
        >>> folder = finetune("runs/photos", fraction=0.1)  # doctest: +SKIP
    """
    from manyviews.cli import run_finetune

    args = [str(model.folder if isinstance(model, Run) else model), *_args(settings)]
    with _interruptible():
        return run_finetune(args, on_metrics=on_metrics)


class Run:
    """A run folder: its settings, metrics, backbone and scores.

    Raises:
        ValueError: if the folder is not a run.

    Examples:
        >>> run = Run("runs/photos")  # doctest: +SKIP
        >>> run.embed(["a.jpg", "b.jpg"]).shape  # doctest: +SKIP
        (2, 512)
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        from manyviews.run.folder import CONFIG

        self.folder = Path(folder).expanduser()
        if not (self.folder / CONFIG).is_file():
            raise ValueError(f"{self.folder} is not a run folder: it has no {CONFIG}")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def config(self) -> "Recipe":
        """The settings of the run."""
        from manyviews.config import load
        from manyviews.recipe import Recipe
        from manyviews.run.folder import CONFIG

        return load(Recipe, self.folder / CONFIG)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, for example for `pandas.DataFrame(run.metrics())`."""
        from manyviews.run.folder import read_metrics

        return list(read_metrics(self.folder))

    def backbone(self) -> "nn.Module":
        """The backbone in evaluation mode: images [batch, channels, size, size] → features [batch, width].

        Its input is (value in [0, 1] − 0.5) / 0.25 in every channel; `embed` takes images as they are.
        """
        from manyviews.features.backbone import open_run

        return open_run(self.folder).backbone().eval()

    def embed(self, images: Any) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Encodes images: paths, PIL images or uint8 arrays, one [width] or many [images, width]."""
        from PIL import Image

        one = isinstance(images, str | PathLike | Image.Image)
        rows = self._features.transform([images] if one else images)
        return rows[0] if one else rows

    def scores(self) -> list[dict[str, Any]]:
        """The measurements of the last evaluation: task, features, metric, value, low, high, n.

        Raises ValueError if the run was not evaluated.
        """
        from manyviews.evaluation.record import EVALUATION, records_in
        from manyviews.evaluation.writing import read

        if not (self.folder / EVALUATION).is_file():
            raise ValueError(f"{self.folder} has no {EVALUATION}: call evaluate() first")
        record, _ = next(records_in(read(self.folder)[0]))
        return [dict(measurement) for measurement in record["measurements"]]

    def evaluate(self, **settings: Any) -> list[dict[str, Any]]:
        """Evaluates the run, with the keys of `manyviews evaluate`; returns `scores`."""
        return evaluate(self, **settings).scores()

    def verify(self, first: Any, second: Any, **settings: Any) -> "Verdict":
        """Compares two images, as `manyviews.verify`."""
        return verify(self, first, second, **settings)

    @cached_property
    def _features(self) -> "Features":
        from manyviews.features.transformer import Features

        return Features(self.folder).fit()


def _args(settings: Mapping[str, Any]) -> list[str]:
    """The arguments of the command line for keywords; a torch dataset becomes its settings."""
    from manyviews.config import Settings, to_args
    from manyviews.data import MapDataset, of_dataset

    data = settings.get("data")
    if isinstance(data, MapDataset) and not isinstance(data, str | Mapping | Settings):
        settings = {**settings, "data": of_dataset(data)}
    return to_args(settings)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns the exit after Ctrl-C into KeyboardInterrupt: a notebook goes on, a program decides."""
    try:
        yield
    except SystemExit as stop:
        if stop.code != 130:
            raise
        raise KeyboardInterrupt from None


def __getattr__(name: str) -> Any:
    """Imports `manyviews.Features` and `of_dataset` on first use: they have many imports."""
    if name == "of_dataset":
        from manyviews.data import of_dataset

        return of_dataset
    if name == "Features":
        from manyviews.features.transformer import Features

        return Features
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
