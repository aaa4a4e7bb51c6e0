"""Batch norms over all ranks keep the layers that timm has made of them; two ranks are in train/test_gpu_run.py."""

import pytest
import timm
import torch
from torch import nn

from manyviews.encoder import sync_batch_norm
from manyviews.encoder.sync_batch_norm import SyncBatchNorm, synchronise_batch_norms


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
