"""Recipes for GPUs: they load, say what they claim and what was never run, and take a step in small."""

import re
import sys
from pathlib import Path

import pytest
import torch

from manyviews import recipe
from manyviews.config import load
from manyviews.data.pictures import pictures
from manyviews.recipe import Recipe
from manyviews.train.pretrain import train_step
from manyviews.train.step import StepResult

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from gpu_checks.loops import images_in_memory, prepared

ROOT = Path(__file__).parents[1]
NAMES = sorted(f"gpu/{file.stem}" for file in (recipe.folder() / "gpu").glob("*.yaml"))
SMALL = (
    "data.path=.",
    "views.size=32",
    "train.batch_size=16",
    "train.compile=false",
    "train.precision=fp32",
    "encoder.projector.dim=16",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_for_gpus_says_what_it_takes_and_that_it_was_not_run(name: str) -> None:
    loaded, text = load(Recipe, recipe.find(name), ["data.path=."]), recipe.find(name).read_text()
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"manyviews pretrain {name} " in text
    assert "Not yet run. By calculation" in header
    assert re.search(r"on one H100: \d+ GB", header)
    assert re.search(r"[\d,]+ to [\d,]+ images/s", header)
    page = (ROOT / "docs" / "gpu.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    memory = re.search(r"on one H100: (\d+ GB)", header)
    assert memory is not None
    assert memory[1] in row
    assert f"{loaded.train.batch_size}" in row


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_for_gpus_takes_a_step(name: str) -> None:
    images = images_in_memory(32, 32)
    sized = ["objective.size=64"] if "moco" in name else []
    components = prepared(name, [*SMALL, *sized], images)
    components.forward.train()
    ids = torch.arange(16)
    result = train_step(components, pictures(images, ids, components.views), ids, 0, 0)
    assert isinstance(result, StepResult)
    assert result.loss.total.isfinite()


def test_recipes_for_gpus_are_in_the_wheel() -> None:
    assert len(NAMES) == 5
    assert '"configs" = "manyviews/configs"' in (ROOT / "pyproject.toml").read_text()


def test_the_memory_of_a_view_is_that_of_what_the_backward_pass_needs() -> None:
    # The headers take 2.3 MiB for a view of the ResNet-18 in 16 bits.
    def kept(count: int) -> int:
        components = prepared("gpu/cifar10", [*SMALL[:-2], "train.precision=bf16"], images_in_memory(32, 32))
        weights = {own.untyped_storage().data_ptr() for own in components.encoder.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        components.forward.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = components.forward(torch.randn(1, count, 3, 32, 32))
        assert result.embeddings.requires_grad
        return sum(storages.values())

    assert (kept(6) - kept(2)) / 4 / 2**20 == pytest.approx(2.3, rel=0.05)
