"""Host waits and launches of a training step on a GPU, for every recipe, counted on a pretend one."""

import pytest
import torch

from manyviews import recipe
from manyviews.config import load
from manyviews.data import InMemory
from manyviews.data.images import array_split
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
    loaded = load(recipe.Recipe, recipe.find(name), [*SMALL, *args])
    accelerator, data = start(BATCH, loaded.train.precision, 1), images()
    loaded = loaded.model_copy(update={"views": loaded.views.resolve(size=data.size, channels=data.channels)})
    components = build(loaded, accelerator, data)
    components.forward.train()
    results = []
    for step in range(count):
        ids = (torch.arange(BATCH) + step * BATCH) % len(data)
        batch = data.read(ids).to(accelerator.device), ids.to(accelerator.device)
        if log is not None:
            log.clear()
        result = train_step(components, *batch, 0, step)
        assert isinstance(result, StepResult)
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
