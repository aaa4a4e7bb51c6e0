from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from manyviews.data import InMemory
from manyviews.data.images import Pictures
from manyviews.data.sampler import order
from manyviews.evaluators.augmented import AugmentedSettings, Heads, RandomCrops, augmented_probe
from manyviews.evaluators.splits import Prediction, hold_out
from manyviews.views import StandardView, Views, ViewsSettings
from processes import start

SETTINGS = AugmentedSettings(epochs=3, batch_size=16, rates=(0.1, 3.0), decays=(0.0, 1e-2))
WHOLE = {"crop_scale": (1.0, 1.0), "flip": 0.0}


def striped(num: int, *, seed: int = 0, size: int = 12) -> InMemory:
    """Noisy images in three classes, by whether the top, the middle or the bottom is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    pixels = torch.randint(0, 120, (num, 1, size, size), generator=generator)
    rows = torch.arange(size) // (size // 3)
    pixels += 60 * (rows == labels[:, None])[:, None, :, None]
    return InMemory(pixels.to(torch.uint8), [str(i) for i in range(num)], labels, ("a", "b", "c"), "0" * 64)


def backbone() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())


VIEW = StandardView(12, 1, mean=128 / 255, std=64 / 255)


def prepare(images: Tensor) -> Tensor:
    return VIEW(Pictures((images,)))


def windows(seed: int = 0) -> Views:
    plain = {"brightness": 0.0, "gamma": 0.0}
    return ViewsSettings(num_views=1, crop_scale=(0.3, 1.0), **plain).build(size=12, channels=1, seed=seed)


def probe(images: InMemory, settings: AugmentedSettings = SETTINGS, module: nn.Module | None = None) -> Prediction:
    return augmented_probe(module or backbone(), images, striped(30, seed=1), VIEW, settings, 3, seed=2)


def test_every_head_takes_the_steps_of_torch_on_the_images_that_count():
    generator = torch.Generator().manual_seed(0)
    grid = [(0.1, 0.0), (2.0, 0.0), (0.5, 0.03)]
    batches = [torch.randn(8, 5, generator=generator) for _ in range(6)]
    labels = torch.randint(3, (6, 8), generator=generator)
    counts = torch.rand(2, 6, 8, generator=generator) < 0.7
    counts[:, :, 0] = True
    heads = Heads(grid, 3, batches[0])
    for step in range(6):
        heads.step(batches[step], labels[step], counts[:, step], 1 - step / 6)
    for part in range(2):
        for number, (rate, decay) in enumerate(grid):
            head = nn.Linear(5, 3)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
            for step in range(6):
                optimiser.param_groups[0]["lr"] = rate * (1 - step / 6)
                seen = counts[part, step]
                optimiser.zero_grad()
                F.cross_entropy(head(batches[step][seen]), labels[step][seen]).backward()
                optimiser.step()
            own = heads.weights[part, number]
            torch.testing.assert_close(own[:, :-1], head.weight.detach(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(own[:, -1], head.bias.detach(), atol=1e-5, rtol=1e-4)


def test_a_head_that_has_diverged_predicts_nothing():
    heads = Heads([(1.0, 0.0), (1.0, 0.0)], 3, torch.zeros(1, 2))
    heads.weights[0, 1, 0, 0] = torch.inf
    assert heads.predict(torch.ones(2, 2), 0).tolist() == [[0, 0], [-1, -1]]


def test_without_augmentation_it_is_gradient_descent_on_plain_features():
    images, module = striped(90), backbone().eval()
    settings = AugmentedSettings(epochs=4, batch_size=32, rates=(0.5, 2.0), decays=(0.0,), **WHOLE)
    result = probe(images, settings)
    with torch.no_grad():
        features = module(prepare(images.pixels))
        test = module(prepare(striped(30, seed=1).pixels))
    _, held = hold_out(images.labels, share=0.2, seed=2)
    counts = torch.ones(2, 90, dtype=torch.bool)
    counts[0, held] = False
    heads, step = Heads([(0.5, 0.0), (2.0, 0.0)], 3, features), 0
    for epoch in range(4):
        for ids in order(90, 2, epoch).split(32):
            factor = 0.5 * (1 + np.cos(np.pi * step / 12)) * 32 / 256
            heads.step(features[ids], images.labels[ids], counts[:, ids], float(factor))
            step += 1
    accuracies = (heads.predict(features[held], 0) == images.labels[held]).double().mean(1)
    assert result.validation == pytest.approx(accuracies.max().item())
    assert result.chosen["rate"] == (0.5, 2.0)[int(accuracies.argmax())]
    assert torch.equal(result.predictions, heads.predict(test, 1, int(accuracies.argmax()))[0])


def test_it_learns_what_the_features_show():
    images = striped(300)
    result = probe(images, SETTINGS.model_copy(update={"epochs": 15, "crop_scale": (0.7, 1.0)}))
    truth = striped(30, seed=1).labels
    assert (result.predictions == truth).float().mean() > 0.8
    assert result.validation > 0.8


def crops(images: Tensor, ids: Tensor, views: Views, epoch: int) -> Tensor:
    return RandomCrops(VIEW, views, epoch, iter(())).pixels(Pictures((images,)), ids)


def test_a_crop_depends_on_image_and_epoch_alone():
    images, ids = striped(20), torch.arange(20)
    whole = crops(images.pixels, ids, windows(), 0)
    assert whole.dtype == torch.uint8
    chosen = torch.tensor([7, 3])
    assert torch.equal(crops(images.read(chosen), chosen, windows(), 0), whole[chosen])
    assert not torch.equal(crops(images.pixels, ids, windows(), 1), whole)
    assert not torch.equal(crops(images.pixels, ids, windows(1), 0), whole)
    untouched = ViewsSettings(num_views=1, brightness=0.0, gamma=0.0, **WHOLE).build(size=12, channels=1, seed=0)
    assert torch.equal(crops(images.pixels, ids, untouched, 0), images.pixels)


def test_the_same_call_gives_the_same_result_and_touches_neither_backbone_nor_generators():
    images, module = striped(60), backbone().train()
    module[1].eval()  # frozen on purpose
    modes = [child.training for child in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generators = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = probe(images, module=module)
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.random.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    second = probe(images, module=module)
    assert torch.equal(first.predictions, second.predictions)
    assert first[1:] == second[1:]


def test_unlabelled_images_are_left_out_and_labels_are_needed():
    images = striped(60)
    images.labels[40:] = -1
    probe(images)
    nothing = InMemory(images.pixels, images.names, None, (), images.fingerprint)
    with pytest.raises(ValueError, match="no labels"):
        probe(nothing)


def _part(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    result = probe(striped(33))
    torch.save(tuple(result), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_result_of_one(tmp_path: Path):
    start(_part, (2, str(tmp_path)), count=2)
    alone = probe(striped(33))
    for rank in range(2):
        predictions, *chosen = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(predictions, alone.predictions)
        assert chosen == list(alone[1:])
