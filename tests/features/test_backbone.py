"""What is opened by a word: runs and timm models alike."""

import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from manyviews.data.images import Pictures
from manyviews.features import run_weights
from manyviews.features.backbone import open_model, open_run
from manyviews.run.checkpoints import Checkpoint
from manyviews.views import StandardView
from small_run import save_checkpoint, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    small_run(folder)
    return folder


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_is_opened_with_its_weights_and_the_input_it_was_trained_on(run: Path) -> None:
    opened = open_model(str(run))
    assert (opened.channels, opened.size, opened.folder) == (1, 28, run)
    assert opened.view == StandardView(28, 1, mean=0.5, std=0.25, interpolation="bicubic", crop_pct=1.0)
    assert opened.origin["file"] == "backbone/model.safetensors"
    assert not equal(opened.backbone(), opened.untrained())
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(opened.view(Pictures((images,))), (images / 255 - 0.5) / 0.25)


def test_a_run_that_has_not_finished_is_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "backbone")
    opened = open_run(unfinished)
    assert opened.origin["file"] == "checkpoints/step-000000007/encoder.safetensors"
    assert equal(opened.backbone(), open_run(run).backbone())


def test_the_projector_comes_from_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    encoder = small_run(tmp_path / "own")
    assert equal(open_run(tmp_path / "own").head("projector").module, encoder.projector)
    shutil.rmtree(tmp_path / "own" / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint, the only file with the projector"):
        open_run(tmp_path / "own").head("projector")
    other = shutil.copytree(run, tmp_path / "other")
    small_run(tmp_path / "wider", "encoder.projector.dim=64", "seed=3")
    state = {name: value + 1 for name, value in open_run(other).weights.items() if value.is_floating_point()}
    object.__setattr__(opened := open_run(other), "weights", state)
    with pytest.raises(ValueError, match=r"of step 7, has other weights than backbone/model\.safetensors"):
        opened.head("projector")


def test_a_timm_model_sees_what_timm_says_it_was_trained_on() -> None:
    opened = open_model("resnet18", pretrained=False, size=32)
    assert (opened.channels, opened.size, opened.folder, opened.recipe) == (3, 32, None, None)
    grey = torch.randint(0, 256, (2, 1, 40, 40), dtype=torch.uint8)
    assert opened.view.crop_pct == 0.95
    prepared = opened.view(Pictures((grey,)))
    # 32 / 0.95 is 33.7, and one pixel too many is left out at the lower right.
    resized = F.interpolate(grey.float(), (33, 33), mode="bicubic", antialias=True).clamp(0, 255)[..., :32, :32]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized.expand(-1, 3, -1, -1) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(prepared, expected, atol=1e-5, rtol=0)


def test_random_weights_are_always_the_same_and_draw_nothing() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = open_model("light_resnet", pretrained=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = open_model("light_resnet", pretrained=False)
    assert first.origin == second.origin
    assert equal(first.backbone(), second.backbone())
    assert equal(first.backbone(), first.untrained())


def test_an_exported_backbone_is_a_timm_model(run: Path) -> None:
    words = f"local-dir:{run / 'backbone'}"
    learned, afresh = open_model(words, pretrained=True), open_model(words, pretrained=False)
    assert equal(learned.backbone(), open_run(run).backbone())
    assert (learned.channels, learned.size, learned.view.mean) == (1, 28, (0.5,))
    assert learned.origin["sha256"] != afresh.origin["sha256"]
    images = Pictures((torch.randint(0, 256, (2, 1, 30, 30), dtype=torch.uint8),))
    torch.testing.assert_close(learned.view(images), open_run(run).view(images), atol=1e-6, rtol=1e-6)


def test_another_size_is_seen_by_what_can_take_it(run: Path, tmp_path: Path) -> None:
    pictures = Pictures((torch.zeros(1, 1, 8, 8, dtype=torch.uint8),))
    assert open_model(str(run), size=40).view(pictures).shape[-1] == 40
    vit = ("encoder.name=vit_tiny_patch16_224",)
    small_run(tmp_path / "vit", *vit, channels=3, size=32)
    with pytest.raises(ValueError, match="trained on 32 pixels, cannot take that; leave size out"):
        open_model(str(tmp_path / "vit"), size=64)


def test_words_that_open_nothing_are_answered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        (str(run), True): "is a run with weights of its own: leave it out",
        ("resnet18", None): r"set pretrained=true for its published weights .* or pretrained=false for random ones",
        ("resnet81", True): r"neither a run \(no folder that exists\) nor a model of timm; timm has resnet\d",
        (str(run) + "s", None): f"neither a run .*; there are .*{run}",
        (str(run / "backbone"), None): f"write local-dir:{run / 'backbone'}",
        (str(run / "config.yaml"), None): r"neither a run \(a file\)",
        (str(run / "checkpoints"), None): r"neither a run \(a folder without config.yaml\)",
        (f"local-dir:{run}", True): "has no config.json",
        ("resnet18.a9_in1k", True): r"cannot be had .* it has .*resnet18\.a1_in1k",
        ("light_resnet", True): "there are no published weights of light_resnet; pretrained=false",
    }
    for (given, pretrained), words in refused.items():
        with pytest.raises(ValueError, match=words):
            open_model(given, pretrained=pretrained)
    monkeypatch.chdir(run.parent)
    assert open_model("small").folder == Path("small")


def test_a_run_that_saves_often_is_opened_whole_and_never_mixed(tmp_path: Path) -> None:
    """Each step's weights are its number: whatever is read at once must be of one step."""
    encoder = small_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "backbone")
    state, optimiser, stop = encoder.state_dict(), {"state": {}, "param_groups": []}, threading.Event()

    def train() -> None:
        for step in itertools.count(8):
            parts = {"encoder": {name: torch.full_like(value, step) for name, value in state.items()}}
            checkpoint = Checkpoint(step, parts, optimiser, {"channels": 1})
            save_checkpoint(tmp_path / "run" / "checkpoints", checkpoint, keep=1)
            if stop.is_set():
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        opened = [open_run(tmp_path / "run") for _ in range(12)]
        seen = []
        for own in opened[1:]:
            numbers = {float(value.flatten()[0]) for value in own.weights.values()}
            projector = own.head("projector")
            numbers |= {float(value.flatten()[0]) for value in projector.module.state_dict().values()}
            assert numbers == {float(own.step)} or own.step == 7
            assert own.origin == projector.origin
            assert own.origin["file"] == f"checkpoints/step-{own.step:09d}/encoder.safetensors"
            seen.append(own.step)
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_a_checkpoint_that_goes_after_it_was_read_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "backbone")
    newest = run_weights.newest_checkpoint

    def read_and_gone(place: Path, **options: object) -> object:
        found = newest(place, **options)
        shutil.rmtree(place)
        return found

    monkeypatch.setattr(run_weights, "newest_checkpoint", read_and_gone)
    opened = open_run(tmp_path / "run")
    assert opened.step == 7
    assert opened.head("projector").origin["sha256"] == opened.origin["sha256"]
    assert opened.untrained() is not None
