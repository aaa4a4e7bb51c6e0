import io
import json
import subprocess
import sys
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from manyviews.encoder.backbone import create_backbone
from manyviews.encoder.batch_norm import split_batch_norms
from manyviews.encoder.encoder import (
    EncoderSettings,
    MomentumTwin,
    PredictorSettings,
    ProjectorSettings,
)
from manyviews.encoder.timm_format import export
from manyviews.train.finetune.loop import Average
from manyviews.views import StandardView

TINY = {"projector": ProjectorSettings(hidden=16, dim=8)}


def build(name="light_resnet", channels=1, size=28, **options):
    torch.manual_seed(0)
    return EncoderSettings(name=name, **TINY | options).build(channels=channels, size=size)


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [
        ("light_resnet", 1, 28, 64 * 16 + 128),
        ("light_resnet", 3, 32, 64 * 16 + 128),
        ("light_resnet", 3, 96, 64 * 16 + 128),
        ("resnet18", 4, 32, 512),
        ("resnet18_small", 3, 16, 512),
        # timm says num_features = 288 of this one, but it returns its 1024 hidden units.
        ("mobilenetv3_small_050", 3, 32, 1024),
        ("vit_tiny_patch16_224", 1, 32, 192),
    ],
)
def test_any_backbone_gives_embeddings_of_the_asked_dimension(name, channels, size, features):
    encoder = build(name, channels, size)
    assert encoder.num_features == features
    assert encoder.backbone(torch.randn(2, channels, size, size)).shape == (2, features)
    embeddings = encoder(torch.randn(3, 2, channels, size, size)).embeddings
    assert embeddings.shape == (3, 2, encoder.dim) == (3, 2, 8)
    embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_sizing_leaves_no_trace():
    torch.manual_seed(0)
    backbone = create_backbone("light_resnet", channels=1, size=28)
    ProjectorSettings().build(128)
    state = torch.get_rng_state()
    encoder = build(projector=ProjectorSettings())
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(encoder.backbone.state_dict()[name], value) for name, value in backbone.state_dict().items())
    assert encoder.backbone.stem[1].num_batches_tracked == 0


def test_all_views_go_through_in_one_pass():
    encoder = build()
    calls = []
    encoder.backbone.stem.register_forward_hook(lambda *_: calls.append(1))
    views = torch.randn(3, 4, 1, 28, 28)
    embeddings = encoder.eval()(views).embeddings
    assert len(calls) == 1
    assert torch.allclose(embeddings[1], encoder(views[1:2]).embeddings[0], atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "batch_norm", "kinds"),
    [
        (0, True, []),
        (1, True, ["Linear"]),
        (2, False, ["Linear", "ReLU", "Linear"]),
        (3, True, ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]),
    ],
)
def test_the_projector_has_the_asked_layers(layers, batch_norm, kinds):
    encoder = build(projector=ProjectorSettings(layers=layers, batch_norm=batch_norm, hidden=12, dim=8))
    assert [type(module).__name__ for module in encoder.projector] == kinds
    assert encoder.dim == (8 if layers else 128)
    assert encoder(torch.randn(2, 2, 1, 28, 28)).embeddings.shape == (2, 2, encoder.dim)


def test_without_a_predictor_the_projections_are_the_embeddings():
    encoder = build()
    embedded = encoder(torch.randn(2, 4, 1, 28, 28))
    assert torch.equal(embedded.embeddings, embedded.projections)
    assert not any(name.startswith("predictor") for name in encoder.state_dict())


@pytest.mark.parametrize(
    ("layers", "kinds"), [(1, ["Linear"]), (2, ["Linear", "BatchNorm1d", "ReLU", "Linear"])], ids=["1", "2"]
)
def test_a_predictor_makes_the_embeddings_from_the_projections(layers, kinds):
    encoder = build(predictor=PredictorSettings(layers=layers, hidden=12)).eval()
    assert [type(module).__name__ for module in encoder.predictor] == kinds
    embeddings, projections = encoder(torch.randn(3, 2, 1, 28, 28))
    assert embeddings.shape == projections.shape == (3, 2, 8)
    assert torch.equal(encoder.predictor(projections.flatten(0, 1)).view_as(embeddings), embeddings)
    encoder.train()(torch.randn(2, 4, 1, 28, 28)).embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_predictor_leaves_the_weights_of_the_rest_as_they_are():
    plain, predicting = build(), build(predictor=PredictorSettings(layers=2))
    assert all(torch.equal(predicting.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"timm has no model 'resnet18_smal'; did you mean .*resnet18_small"):
        build("resnet18_smal")


def test_images_a_backbone_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"cannot take 30 x 30 pixels of 1 channels.*views\.size"):
        build("maxvit_pico_rw_256", 1, 30)


def test_an_option_a_backbone_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"light_resnet does not take .*drop_path_rate"):
        build(drop_path=0.1)
    assert build("resnet18", 3, 32, drop_path=0.1).training


def test_weights_that_cannot_be_had_are_an_error_in_words(monkeypatch):
    def no_network(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("socket.create_connection", lambda *args, **options: io.BytesIO())
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", no_network)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(ValueError, match=r"of resnet18 cannot be had .*no route to host.*encoder\.pretrained=false"):
        build("resnet18", 3, 32, pretrained=True)
    with pytest.raises(ValueError, match="/nowhere is no folder in timm's format"):
        build("local-dir:/nowhere", 3, 32)
    with pytest.raises(ValueError, match=r"no published weights of light_resnet; encoder\.pretrained=false"):
        build(pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet18.a1_in1k"])
def test_without_a_network_weights_are_looked_for_once_in_the_cache_alone(monkeypatch, caplog, tmp_path, name):
    asked = []

    def refused(address, **options):
        asked.append(address)
        raise OSError(111, "connection refused")

    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr("manyviews.encoder.timm_format.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached: connection refused.*local-dir:FOLDER"):
        build(name, 3, 32, pretrained=True)
    assert len(asked) == 1
    assert time.monotonic() - began < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.popitem(), r"it lacks 1 \([\w.]+\) of \d+ keys; both files must be of one model"),
        (lambda weights: weights.update(extra=torch.zeros(1)), r"it has 1 \(extra\) that the model does not"),
        (lambda weights: weights.update({"head.weight": torch.zeros(3, 3)}), "model.safetensors"),
        (None, r"has no model\.safetensors.*encoder\.pretrained=false"),
    ],
)
def test_what_a_folder_lacks_of_a_models_weights_is_named(tmp_path, change, message):
    torch.manual_seed(0)
    export(build().backbone, tmp_path, StandardView(28, 1, 0.5, 0.5).pretrained_cfg)
    file = tmp_path / "model.safetensors"
    if change is None:
        file.unlink()
    else:
        weights = {name: value.clone() for name, value in load_file(file).items()}
        change(weights)
        save_file(weights, file)
    with pytest.raises(ValueError, match=message) as refused:
        build(f"local-dir:{tmp_path}", 1, 28, pretrained=True)
    assert "network" not in str(refused.value)


# The momentum twin


def test_the_twin_starts_as_a_true_copy_without_gradient():
    encoder = build()
    twin = MomentumTwin(encoder)
    own, other = twin.encoder.state_dict(), encoder.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not {value.data_ptr() for value in own.values()} & {value.data_ptr() for value in other.values()}
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not twin(torch.randn(2, 4, 1, 28, 28)).requires_grad
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_twin_follows_with_its_momentum():
    encoder = build()
    twin = MomentumTwin(encoder)
    before = {name: value.clone() for name, value in twin.encoder.state_dict().items()}
    with torch.no_grad():
        for value in encoder.state_dict().values():
            value.copy_(torch.randint_like(value, 5, 9) if not value.is_floating_point() else torch.rand_like(value))
    twin.update(encoder, 0.9)
    for name, target in encoder.state_dict().items():
        own = twin.encoder.state_dict()[name]
        if target.is_floating_point():
            assert torch.allclose(own, 0.9 * before[name] + 0.1 * target, atol=1e-6)
        else:
            assert torch.equal(own, target)
    twin.update(encoder, 0.0)
    assert all(torch.equal(twin.encoder.state_dict()[name], value) for name, value in encoder.state_dict().items())
    twin.update(encoder, 1.0)
    assert all(torch.equal(twin.encoder.state_dict()[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("average", [False, True], ids=["twin", "average of fine-tuning"])
def test_a_tensor_that_layers_share_follows_once(average):
    encoder = build()
    encoder.projector.append(nn.Linear(8, 8, bias=False)).append(nn.Linear(8, 8, bias=False))
    encoder.projector[-1].weight = encoder.projector[-2].weight
    follower = Average(encoder, decay=0.75) if average else MomentumTwin(encoder)
    followed = follower.module if average else follower.encoder
    assert followed.projector[-1].weight is followed.projector[-2].weight
    expected = followed.projector[-1].weight.detach() * 0.75 + 0.25
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(1.0)
    if average:
        follower.update(encoder)
    else:
        follower.update(encoder, 0.75)
    torch.testing.assert_close(followed.projector[-1].weight.detach(), expected)


def test_the_twin_of_an_encoder_with_a_predictor_gives_projections_and_has_none():
    encoder = build(predictor=PredictorSettings(layers=2), batch_norm_splits=2)
    twin = MomentumTwin(encoder)
    assert twin.encoder.state_dict().keys() == {n for n in encoder.state_dict() if not n.startswith("predictor")}
    views = torch.randn(2, 4, 1, 28, 28)
    assert torch.equal(twin.eval()(views), encoder.eval()(views).projections)
    twin.update(encoder, 0.5)


# Split batch norms


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_split_batch_norm_is_one_batch_norm_per_part(interleaved):
    norm, images = nn.BatchNorm2d(3), torch.randn(14, 3, 5, 5)
    order = torch.arange(14)
    rows = [order[part::4] for part in range(4)] if interleaved else list(order.tensor_split(4))
    single, expected = [nn.BatchNorm2d(3) for _ in rows], torch.empty_like(images)
    for one, part in zip(single, rows, strict=True):
        expected[part] = one(images[part])
    split_batch_norms(norm, 4, interleaved=interleaved)
    inputs = images.clone().requires_grad_()
    outputs = norm(inputs)
    assert torch.allclose(outputs, expected, atol=1e-6)
    assert torch.allclose(norm.running_mean, torch.stack([one.running_mean for one in single]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([one.running_var for one in single]).mean(0), atol=1e-6)
    assert norm.num_batches_tracked == 1
    # A second pass before the backward one must not touch what the first one remembers.
    (outputs.square().sum() + norm(inputs).sum()).backward()
    assert inputs.grad.isfinite().all()
    norm.eval()
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(images), plain(images))


@pytest.mark.parametrize(("name", "channels"), [("light_resnet", 1), ("mobilenetv3_small_050", 3)])
def test_splitting_keeps_the_names_in_the_state(name, channels):
    whole, split = build(name, channels, 32), build(name, channels, 32, batch_norm_splits=2)
    split.load_state_dict(whole.state_dict())
    views = torch.randn(2, 4, channels, 32, 32)
    assert torch.equal(split.eval()(views).embeddings, whole.eval()(views).embeddings)
    assert not torch.allclose(split.train()(views).embeddings, whole.train()(views).embeddings, atol=1e-3)


def test_the_twin_groups_samples_otherwise_than_the_encoder():
    encoder = build(batch_norm_splits=2)
    twin = MomentumTwin(encoder)
    views = torch.randn(1, 8, 1, 28, 28)
    # What a sample becomes depends on the samples of its own part only.
    for embed, companions, strangers in (
        (lambda views: encoder(views).embeddings, (2, 4, 6), (1, 3, 5, 7)),
        (twin, (1, 2, 3), (4, 5, 6, 7)),
    ):
        reference = embed(views)[0, 0]
        for group, same in ((strangers, True), (companions, False)):
            changed = views.clone()
            changed[0, list(group)] += 1
            assert torch.allclose(embed(changed)[0, 0], reference, atol=1e-5) == same


def test_too_few_samples_for_the_parts_are_refused():
    with pytest.raises(ValueError, match=r"4 samples cannot be split into 3 parts .*batch_norm_splits=2"):
        build(batch_norm_splits=3)(torch.randn(2, 2, 1, 28, 28))


# Export


def test_plain_timm_loads_the_export_strictly_and_gives_equal_features(tmp_path):
    stock = [("resnet18", 4, 32), ("vit_tiny_patch16_224", 1, 32), ("mobilenetv3_small_050", 3, 32)]
    small = [("light_resnet", 1, 28), ("resnet18_small", 3, 32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, channels, size in stock + small:
        encoder = build(name, channels, size, batch_norm_splits=2).to(memory_format=torch.channels_last)
        encoder(torch.randn(2, 4, channels, size, size))
        images = torch.randn(3, channels, size, size)
        description = dict(encoder.backbone.pretrained_cfg)
        export(encoder.backbone, tmp_path / name, StandardView(size, channels, 0.5, 0.25).pretrained_cfg)
        assert encoder.backbone.pretrained_cfg == description
        contiguous = encoder.backbone.eval().to(memory_format=torch.contiguous_format)
        torch.save({"images": images, "features": contiguous(images)}, tmp_path / f"{name}.pt")
        stored = load_file(tmp_path / name / "model.safetensors")
        assert stored.keys() == timm.create_model(name, num_classes=0, in_chans=channels).state_dict().keys()
        assert json.loads((tmp_path / name / "config.json").read_text())["architecture"] == name
    torch.set_num_threads(threads)
    code = f"""
import sys, torch, timm

def check(name, channels, size):
    model = timm.create_model("local-dir:" + name, pretrained=True).eval()
    expected = torch.load(name + ".pt")
    with torch.no_grad():
        assert torch.equal(model(expected["images"]), expected["features"])
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (channels, size, size), data
    assert set(data["mean"]) == {{0.5}} and set(data["std"]) == {{0.25}}, data
    assert model.num_classes == 0
    timm.data.create_transform(**data, is_training=False)

torch.set_num_threads(1)
for stock in {stock}:
    check(*stock)
assert not any(name.split(".")[0] == "manyviews" for name in sys.modules)
import manyviews.encoder.small_models
for small in {small}:
    check(*small)
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def shared_by_the_model():
    return create_backbone("coat_lite_tiny", channels=3, size=32)


def shared_by_somebody():
    backbone = create_backbone("resnet18_small", channels=3, size=32)
    backbone.layer1[1] = backbone.layer1[0]
    backbone.layer2[1].conv2.weight = backbone.layer2[1].conv1.weight
    return backbone


def strided():
    backbone = create_backbone("resnet18_small", channels=3, size=32)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.transpose(0, -1).contiguous().transpose(0, -1)
    backbone.conv1.weight.data = torch.zeros(1, 1, 1, 1).expand(backbone.conv1.weight.shape)
    return backbone


@pytest.mark.parametrize("made", [shared_by_the_model, shared_by_somebody, strided])
def test_weights_that_share_memory_are_exported_each_under_its_name(tmp_path, made):
    torch.manual_seed(0)
    backbone, images = made().eval(), torch.randn(2, 3, 32, 32)
    export(backbone, tmp_path / "backbone", StandardView(32, 3, 0.5, 0.25).pretrained_cfg)
    assert load_file(tmp_path / "backbone" / "model.safetensors").keys() == backbone.state_dict().keys()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), backbone(images), rtol=0, atol=1e-6)


def test_an_export_is_readable_for_whom_its_folder_is(tmp_path):
    export(build().backbone, tmp_path / "backbone", StandardView(28, 1, 0.5, 0.25).pretrained_cfg)
    for file in (tmp_path / "backbone").iterdir():
        assert file.stat().st_mode & 0o777 == (tmp_path / "backbone").stat().st_mode & 0o666


def test_an_export_is_a_starting_point_for_another_encoder(tmp_path):
    first = build()
    export(first.backbone, tmp_path, StandardView(28, 1, 0.5, 0.25).pretrained_cfg)
    second = build(f"local-dir:{tmp_path}", pretrained=True)
    other = build(f"local-dir:{tmp_path}")
    assert all(
        torch.equal(second.backbone.state_dict()[name], value) for name, value in first.backbone.state_dict().items()
    )
    assert type(other.backbone) is type(first.backbone)


# The small models


@pytest.mark.parametrize("name", ["light_resnet", "resnet18_small", "resnet50_small"])
def test_small_models_behave_as_timm_models_do(name):
    model = timm.create_model(name, num_classes=7, in_chans=1)
    images = torch.randn(2, 1, 32, 32)
    assert model(images).shape == (2, 7)
    features = model.forward_features(images)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert torch.allclose(model.eval().forward_head(model.forward_features(images)), model(images))
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    assert model.get_classifier() is not None
    assert model.pretrained_cfg["first_conv"] in dict(model.named_modules())


def test_the_small_stem_keeps_the_resolution():
    model = timm.create_model("resnet18_small", features_only=True)
    assert [stage.shape[-1] for stage in model(torch.randn(1, 3, 32, 32))] == [32, 32, 16, 8, 4]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


def test_the_light_features_read_two_stages_of_equal_weight():
    model = timm.create_model("light_resnet", num_classes=0, in_chans=1)
    features = model(torch.randn(4, 1, 28, 28))
    earlier, last = features.split([64 * 16, 128], 1)
    assert torch.allclose(earlier.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(last.norm(dim=1), torch.ones(4), atol=1e-5)
    (features.sum() + model.forward_summary(torch.zeros(2, 1, 28, 28)).sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_projector_reads_the_last_stage_only():
    encoder = build().eval()
    images = torch.randn(2, 1, 28, 28)
    last = encoder.backbone.forward_features(images)[1]
    assert torch.allclose(encoder(images[None]).embeddings[0], encoder.projector(last.mean((2, 3))), atol=1e-6)
    assert encoder.projector[0].in_features == 128
