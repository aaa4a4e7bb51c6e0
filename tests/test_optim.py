import math

import pytest
import timm
import torch
from torch import nn

from manyviews.optim import OptimSettings, cosine, decay_groups, set_rate


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def take_steps(module: nn.Module, optimiser: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimiser.zero_grad()
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
        module(inputs).square().mean().backward()
        optimiser.step()


def test_resnet18_has_20_tensors_that_decay_and_40_that_do_not():
    module = timm.create_model("resnet18", num_classes=0)
    decayed, spared = decay_groups(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert (len(decayed), len(spared)) == (20, 40)
    assert all(names[id(parameter)].endswith("weight") and parameter.ndim == 4 for parameter in decayed)
    assert all("bn" in names[id(p)] or "downsample.1" in names[id(p)] for p in spared)


def test_position_embeddings_that_timm_exempts_do_not_decay_and_frozen_ones_do_not_move():
    inner = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    inner.patch_embed.proj.weight.requires_grad_(False)
    decayed, spared = decay_groups(nn.ModuleDict({"encoder": inner}))
    assert any(parameter is inner.pos_embed for parameter in spared)
    assert any(parameter is inner.cls_token for parameter in spared)
    assert not any(parameter is inner.patch_embed.proj.weight for parameter in [*decayed, *spared])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_groups_of_every_optimiser_differ_in_decay_alone(name):
    optimiser = OptimSettings(name=name, weight_decay=0.1).build(small(), batch_size=256)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in optimiser.param_groups] == [2, 4]
    assert optimiser.param_groups[0]["lr"] == optimiser.param_groups[1]["lr"]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_parameters_of_an_objective_are_the_last_group_without_decay_or_adaptation(name):
    objective = nn.Linear(3, 5, bias=False)
    settings = OptimSettings(name=name, weight_decay=0.1, rate=0.5, scale="none", momentum=0.0)
    optimiser = settings.build(small(), objective, batch_size=256)
    assert [len(group["params"]) for group in optimiser.param_groups] == [2, 4, 1]
    group = optimiser.param_groups[-1]
    assert group["params"][0] is objective.weight
    assert (group["weight_decay"], group["lr"], group["peak_rate"]) == (0.0, 0.5, 0.5)
    before, objective.weight.grad = objective.weight.detach().clone(), torch.full((5, 3), 0.25)
    optimiser.step()
    step = 0.5 if name == "adamw" else 0.125
    torch.testing.assert_close(objective.weight.detach(), before - step)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_is_the_papers_update_and_leaves_norms_and_biases_to_plain_momentum(decay):
    module = small()
    settings = OptimSettings(name="lars", rate=0.5, scale="none", weight_decay=decay, trust=0.02)
    optimiser = settings.build(module, batch_size=64)
    expected = [parameter.detach().double().clone() for parameter in module.parameters()]
    speeds = [torch.zeros_like(value) for value in expected]
    for number in range(4):
        optimiser.zero_grad()
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
        module(inputs).square().mean().backward()
        for index, parameter in enumerate(module.parameters()):
            weight, gradient = expected[index], parameter.grad.double()
            if parameter.ndim > 1:
                trust = 0.02 * weight.norm() / (gradient.norm() + decay * weight.norm())
                gradient = trust * (gradient + decay * weight)
            speeds[index] = 0.9 * speeds[index] + gradient
            expected[index] = weight - 0.5 * speeds[index]
        optimiser.step()
    for parameter, value in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-6, rtol=1e-5)


def test_the_rate_follows_the_global_batch_except_for_adamw():
    assert OptimSettings().peak_rate(64) == OptimSettings().peak_rate(4096) == 3e-3
    assert OptimSettings(name="sgd").peak_rate(512) == pytest.approx(0.12)
    assert OptimSettings(name="lars").peak_rate(4096) == pytest.approx(4.8)
    assert OptimSettings(name="sgd", rate=0.1, scale="sqrt").peak_rate(1024) == pytest.approx(0.2)
    assert OptimSettings(name="sgd", rate=0.1, scale="none").peak_rate(1024) == 0.1
    assert OptimSettings(name="adamw", rate=0.1, scale="linear").peak_rate(512) == 0.2


def test_the_schedule_rises_to_one_falls_to_zero_and_knows_no_step():
    assert cosine(0.0, 0.1) == 0.0
    assert cosine(0.05, 0.1) == pytest.approx(0.5)
    assert cosine(0.1, 0.1) == 1.0
    assert cosine(0.55, 0.1) == pytest.approx(0.5)
    assert cosine(1.0, 0.1) == pytest.approx(0.0)
    assert cosine(0.0) == 1.0
    assert cosine(1.7, 0.1) == cosine(1.0, 0.1)
    falling = [cosine(0.1 + 0.009 * number, 0.1) for number in range(101)]
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= factor <= 1 for factor in falling)


def test_set_rate_is_a_share_of_the_peak_however_often_it_is_set():
    optimiser = OptimSettings(name="sgd", rate=0.2).build(small(), batch_size=256)
    for factor in (0.5, 0.1, 1.0, 0.25):
        set_rate(optimiser, factor)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.2 * factor] * 2)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_saved_state_loads_without_pickle_and_goes_on_bit_for_bit(name, tmp_path):
    straight, stopped = small(), small()
    settings = OptimSettings(name=name)
    optimiser = settings.build(straight, batch_size=256)
    take_steps(straight, optimiser, 3)
    torch.save({"state": optimiser.state_dict()}, tmp_path / "optimiser.pt")
    stopped.load_state_dict(straight.state_dict())
    resumed = settings.build(stopped, batch_size=256)
    resumed.load_state_dict(torch.load(tmp_path / "optimiser.pt", weights_only=True)["state"])
    for module, steps in ((straight, optimiser), (stopped, resumed)):
        set_rate(steps, 0.5)
        take_steps(module, steps, 2)
    for one, two in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, two)


def test_wrong_settings_are_refused():
    wrong: dict[str, object]
    for wrong in ({"name": "adam"}, {"rate": 0}, {"betas": (0.9, 1.0)}, {"warmup": 1.0}, {"momentum": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OptimSettings(**wrong)
    with pytest.raises(ValueError, match="nothing to train"):
        OptimSettings().build(small().requires_grad_(False), batch_size=8)
