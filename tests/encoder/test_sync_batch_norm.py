"""Batch norms of several GPUs: those of one process that has the whole batch."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from manyviews.encoder import sync_batch_norm
from manyviews.encoder.sync_batch_norm import SyncBatchNorm, synchronise_batch_norms
from manyviews.system import distributed
from manyviews.system.launch import start
from pretend_cuda import pretend_cuda
from processes import launched

IMAGES = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PARTS = (slice(0, 4), slice(4, 7))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(3), BatchNormAct2d(3), nn.Flatten(), nn.BatchNorm1d(48)
    for norm in norms:
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return nn.Sequential(*norms)


def results(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state after one step; the loss is a sum over images."""
    images = images.clone().requires_grad_()
    output = module(images)
    (output * images.detach().flatten(1).sin().roll(1, 1)).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
    tensors = {"output": output, "images": images.grad, **gradients, **dict(module.named_buffers())}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def on_two_gpus(folder: str) -> None:
    with pretend_cuda(2) as log:
        device = start(None, "fp32", 1).device
        module = synchronise_batch_norms(layers()).to(device).train()
        own = IMAGES[PARTS[distributed.rank()]].to(device)
        log.clear()
        output = module(own)
        output.sum().backward()
        assert log.waits == {}
        assert log.collectives["nccl allreduce_"] == 2
        torch.save(
            results(synchronise_batch_norms(layers()).to(device).train(), own), f"{folder}/{distributed.rank()}.pt"
        )


def test_norms_of_two_gpus_are_those_of_the_whole_batch_and_wait_for_nothing(tmp_path: Path) -> None:
    launched(on_two_gpus, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = results(layers().train(), IMAGES)
    for name, value in expected.items():
        if name in ("output", "images"):
            found = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("gradient"):
            found = ranks[0][name] + ranks[1][name]
        else:
            found = ranks[0][name]
            assert torch.equal(found, ranks[1][name]), name
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
@pytest.mark.parametrize("training", [True, False])
def test_one_process_computes_as_before_with_the_same_keys(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).train(training)
    images, keys = torch.randn(4, 3, 32, 32), [*model.state_dict()]
    expected = model(images)
    synchronised = synchronise_batch_norms(model)
    norms = [child for child in synchronised.modules() if isinstance(child, nn.SyncBatchNorm)]
    assert norms
    assert all(isinstance(norm, SyncBatchNorm) for norm in norms)
    assert [*synchronised.state_dict()] == keys
    torch.testing.assert_close(synchronised(images), expected)


def test_torchs_own_layers_stay_where_torch_lacks_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_batch_norm, "KERNELS", ("stats", "of_the_future"))
    found = synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(3)))
    assert type(found[0]) is nn.SyncBatchNorm
