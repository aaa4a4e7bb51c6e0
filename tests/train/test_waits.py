"""Host waits and launches of a training step on a GPU, for every recipe, counted on a pretend one."""

import pytest
import torch

from manyviews import recipe
from manyviews.config import load
from manyviews.data import InMemory
from manyviews.data.images import Pictures, array_split
from manyviews.system.launch import start
from manyviews.train.components import build
from manyviews.train.pretrain import train_step
from manyviews.train.step import StepResult
from pretend_cuda import Log, pretend_cuda

BATCH = 24
SMALL = [f"train.batch_size={BATCH}", "train.precision=fp32", "train.images_per_class=null"]


def images() -> InMemory:
    """Grey images of four classes."""
    pixels = torch.randint(0, 256, (96, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return array_split("images", pixels, torch.arange(96) % 4, "0123")


def log_and_results(name: str, *args: str, count: int = 2) -> tuple[Log, list[StepResult]]:
    """Some training steps of a recipe on the pretend GPU: the log of the last one, and the results of all."""
    with pretend_cuda() as log:
        return log, steps(name, *args, count=count, log=log)


def steps(name: str, *args: str, count: int = 2, log: Log | None = None) -> list[StepResult]:
    """Runs some training steps of a recipe, on the device that torch sees."""
    given = {word.split("=")[0] for word in args}
    kept = [word for word in SMALL if word.split("=")[0] not in given]
    loaded = load(recipe.Recipe, recipe.find(name), [*kept, *args])
    accelerator, data = start(BATCH, loaded.train.precision, 1), images()
    loaded = loaded.model_copy(update={"views": loaded.views.resolve(size=data.size, channels=data.channels)})
    components = build(loaded, accelerator, data)
    components.forward.train()
    results = []
    for step in range(count):
        ids = (torch.arange(BATCH) + step * BATCH) % len(data)
        batch = Pictures((data.read(ids),)).to(accelerator.device), ids.to(accelerator.device)
        if log is not None:
            log.clear()
        result = train_step(components, *batch, 0, step)
        assert isinstance(result, StepResult)
        # As the loop does: a GPU has work while the host asks for the step before.
        assert not results or results[-1].skipped() is None
        results.append(result)
    return results


@pytest.mark.parametrize("name", recipe.names())
def test_the_steps_of_every_recipe_are_those_of_the_cpu(name: str) -> None:
    # SGD: Adam's first steps, by the signs of the gradient, enlarge rounding errors.
    sgd = ["optim.name=sgd", "optim.rate=0.1", "optim.scale=none"]
    for result, expected in zip(log_and_results(name, *sgd)[1], steps(name, *sgd), strict=True):
        assert result.loss.total.device.type == "cuda"
        torch.testing.assert_close(result.loss.total.cpu(), expected.loss.total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.embeddings.cpu(), expected.embeddings, rtol=1e-3, atol=1e-3)


OF_PAIRS = ("facenet", "margin_distance_weighted", "siamese")
"""Recipes that wait once a step, for how many images of a class are in the batch, without `train.images_per_class`."""
LAUNCHES = {
    "arcface": 380,
    "arcface_instances": 380,
    "cosface": 380,
    "cpc": 600,
    "facenet": 430,
    "facenet_instances": 430,
    "instance_discrimination": 350,
    "instance_discrimination_nce": 400,
    "list_net": 370,
    "log_ratio": 420,
    "margin_distance_weighted": 550,
    "margin_distance_weighted_instances": 550,
    "moco": 700,
    "n_pair": 450,
    "n_pair_instances": 570,
    "nnclr": 480,
    "noise_contrastive": 410,
    "quickstart": 360,
    "siamese": 550,
    "siamese_instances": 550,
    "simclr": 360,
    "sphereface": 410,
    "supervised": 390,
}
"""Launches of a step by recipe, with 24 images and the smallest encoder."""


@pytest.mark.parametrize("name", recipe.names())
def test_the_step_of_every_recipe_keeps_to_its_budget_of_waits_and_launches(name: str) -> None:
    log, _ = log_and_results(name)
    assert log.waits.total() == (name in OF_PAIRS), log
    assert log.launches.total() <= LAUNCHES[name], log


@pytest.mark.parametrize("name", recipe.names())
def test_no_objective_makes_the_host_wait(name: str) -> None:
    # A batch of 24 images of four classes has 6 of each, no more than the 8 that bound them.
    of_classes = load(recipe.Recipe, recipe.find(name)).ids == "labels"
    log, _ = log_and_results(name, *["train.images_per_class=8"] * of_classes)
    assert not [line for line in log.waits if line.startswith(("objectives/", "engine/"))], str(log)
