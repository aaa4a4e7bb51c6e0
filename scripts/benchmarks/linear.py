"""The swept linear probe beside lightly's 90 epochs on augmented images and scikit-learn's logistic regression."""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from benchmarks import harness
from manyviews.data import FashionMNIST, Images, Sample
from manyviews.data.images import Pictures
from manyviews.evaluators.linear import LinearSettings, linear
from manyviews.evaluators.splits import Prediction, hold_out
from manyviews.features.backbone import PretrainedBackbone, open_run
from manyviews.features.encoding import extract

EPOCHS = 90
BATCH = 256
RATE = 0.1
SHARE, SEED = 0.2, 0
NOTES = (
    "the same frozen backbone and images for all. seconds: from images to test predictions, with the encoding.",
    "epochs: how often the backbone encodes the training images. times ours: the seconds over the median of ours.",
    "ours, scikit-learn: features of the plain images, encoded once; standardised; the strength is the best of the",
    "same ten on the same held-out fifth of the training images, and the probe is fitted again on all.",
    "lightly: its LinearClassifier under a Lightning Trainer, as its ImageNet script trains it: stochastic gradient",
    "descent, rate 0.1 per 256 images, momentum 0.9, no decay, cosine, batches of 256; without validation, logs and",
    "checkpoints, which would only take time. Nothing is chosen: what a rate is worth depends on the features' scale.",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The backbone, the images, and how much of lightly's protocol is run."""
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run folder; without, quickstart trains one first")
    parser.add_argument("--full", action="store_true", help="all of Fashion-MNIST instead of the package's sample")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"epochs of lightly's ({EPOCHS})")
    parser.add_argument("--rate", type=float, default=RATE, metavar="R", help=f"lightly's rate for 256 images ({RATE})")
    parser.add_argument("--plain", action="store_true", help="lightly's without random crops and flips")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="lightly's processes that read images (2)")


def run(options: argparse.Namespace) -> harness.Report:
    """Times ours as often as asked, and each rival once: lightly's takes minutes."""
    opened = _opened(options.run)
    split = (FashionMNIST() if options.full else Sample()).build(workers=2)
    train, test = split.train, split.test
    assert train.labels is not None
    assert test is not None
    assert test.labels is not None
    backbone = opened.backbone().to(memory_format=torch.channels_last)
    results: list[Prediction] = []
    parts: dict[str, list[float]] = {"encoding": [], "probe": []}

    def ours() -> None:
        start = time.perf_counter()
        features = [extract(backbone, images, view=opened.view, batch_size=BATCH) for images in (train, test)]
        middle = time.perf_counter()
        results.append(linear(features[0], train.labels, features[1], 10, LinearSettings(), share=SHARE, seed=SEED))
        parts["encoding"].append(middle - start)
        parts["probe"].append(time.perf_counter() - middle)

    own = harness.seconds({"ours": ours}, options.repetitions, warm_up=False)["ours"]

    def row(name: str, seconds: harness.Value, epochs: int, predictions: Tensor, choice: float | None) -> Any:
        median = seconds.median if isinstance(seconds, harness.Spread) else seconds
        accuracy = float((predictions == test.labels).double().mean())
        return {
            "probe": name,
            "seconds": seconds,
            "epochs": epochs,
            "times ours": median / own.median,
            "accuracy %": 100 * accuracy,
            "strength": choice,
        }

    rows = [row("ours, swept", own, 1, results[0].predictions, results[0].chosen["regularisation"])]
    predictions, seconds, choice = _timed(lambda: _scikit_learn(opened, backbone, train, test))
    rows.append(row("scikit-learn LogisticRegression, swept", seconds, 1, predictions, choice))
    view = "plain images" if options.plain else "random crops and flips"
    name = f"lightly LinearClassifier, {view}"
    try:
        predictions, seconds, _ = _timed(lambda: _lightly(opened, backbone, train, test, options))
        rows.append(row(name, seconds, options.epochs, predictions, None))
    except harness.RivalMissingError as problem:
        rows.append({"probe": name, "seconds": str(problem)})
    shares = ", ".join(f"{name} {harness.Spread.of(values).median:.2f} s" for name, values in parts.items())
    notes = [*NOTES, f"ours: {shares}."]
    if options.rate != RATE:
        notes.append(f"a rate of {options.rate:g} is not lightly's, which is {RATE}.")
    if options.epochs != EPOCHS:
        notes.append(f"{options.epochs} epochs are not lightly's protocol, which has {EPOCHS}.")
    return harness.Report(
        title=f"Linear evaluation of {len(train):,} + {len(test):,} images, backbone: {opened.name}",
        rows=rows,
        notes=notes,
        packages=("lightly", "pytorch-lightning", "scikit-learn"),
    )


def _opened(folder: Path | None) -> PretrainedBackbone:
    if folder is not None:
        return open_run(folder)
    with TemporaryDirectory() as temporary:
        output = Path(temporary) / "quickstart"
        harness.commands(torch.get_num_threads(), ["pretrain", "quickstart", f"output={output}"])
        return open_run(output)


def _timed(work: Callable[[], tuple[Tensor, float | None]]) -> tuple[Tensor, float, float | None]:
    start = time.perf_counter()
    predictions, choice = work()
    return predictions, time.perf_counter() - start, choice


def _scikit_learn(opened: PretrainedBackbone, backbone: nn.Module, train: Images, test: Images) -> tuple[Tensor, float]:
    """The same protocol by scikit-learn: predictions of the test images and the strength that was chosen."""
    assert train.labels is not None
    features, shown = (
        extract(backbone, images, view=opened.view, batch_size=BATCH).numpy() for images in (train, test)
    )
    labels = train.labels.numpy()
    kept, held = (part.numpy() for part in hold_out(train.labels, share=SHARE, seed=SEED))

    def fitted(rows: Any, classes: Any, strength: float) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * len(rows)), max_iter=1000))
        return model.fit(rows, classes)

    strengths = sorted(LinearSettings().regularisations, reverse=True)
    right = [fitted(features[kept], labels[kept], value).score(features[held], labels[held]) for value in strengths]
    best = strengths[right.index(max(right))]
    return torch.from_numpy(fitted(features, labels, best).predict(shown)), best


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Images as a torchvision data set has them: PIL pictures, transformed one by one."""

    def __init__(self, images: Images, transform: Callable[[Any], Tensor]) -> None:
        assert images.labels is not None
        self.pictures = [to_pil_image(picture) for picture in images.read(torch.arange(len(images)))]
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def _classifier() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return harness.rival("lightly.utils.benchmarking", "LinearClassifier")


def _lightly(
    opened: PretrainedBackbone,
    backbone: nn.Module,
    train: Images,
    test: Images,
    options: argparse.Namespace,
) -> tuple[Tensor, None]:
    """The protocol of lightly: predictions of the test images by the head after the last epoch."""
    trainer, classifier = harness.rival("pytorch_lightning", "Trainer"), _classifier()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
    finish = [transforms.ToTensor(), transforms.Normalize(opened.view.mean, opened.view.std)]
    crops = [] if options.plain else [transforms.RandomResizedCrop(opened.size), transforms.RandomHorizontalFlip()]
    pictures = _Pictures(train, transforms.Compose([*crops, *finish]))
    loader = DataLoader(
        pictures,
        BATCH,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    width = backbone(opened.view(Pictures((train.read(torch.arange(1)),)))).shape[1]
    torch.manual_seed(SEED)
    model = classifier(backbone, BATCH, lr=options.rate, feature_dim=width, num_classes=10)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer(max_epochs=options.epochs, accelerator="cpu", enable_model_summary=False, **settings).fit(model, loader)
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(_Pictures(test, transforms.Compose(finish)), BATCH)
        return torch.cat([model(shown).argmax(1) for shown, _ in batches]), None
