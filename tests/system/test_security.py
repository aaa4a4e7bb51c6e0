"""What strangers hand over cannot run code, reach out of its folder or use a network; what is wrong with it is said."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_files import Planted
from torch import nn

from manyviews import cli
from manyviews.config import load
from manyviews.encoder import timm_format
from manyviews.encoder.backbone import create_backbone
from manyviews.encoder.timm_format import read_folder
from manyviews.evaluation import EvaluateSettings
from manyviews.evaluation.compare_runs import Shared, measured_before
from manyviews.features import store
from manyviews.features.backbone import open_model, open_run
from manyviews.features.extract import ExtractSettings, extract
from manyviews.run.folder import prepare
from manyviews.system.files import sha256
from small_run import photographs, small_run

QUIET = ("report=false", "tasks=geometry", "baselines=false")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    small_run(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(timm_format, "hf_hub_download", refuse)


def change(file: Path, **values: object) -> None:
    """Other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_names_do_not_reach_the_network_unless_weights_are_asked_for(run: Path, no_network: None) -> None:
    for name in ("hf-hub:someone/model", "hf_hub:someone/model"):
        with pytest.raises(ValueError, match="is looked up on a network, which takes pretrained=true"):
            create_backbone(name, channels=3, size=32)
        with pytest.raises(ValueError, match="is looked up on a network, which takes pretrained=true"):
            open_model(name, pretrained=False)
    for name in ("https://example.org/model.pth", "file:///etc/passwd", "../model", "hub/hf-hub:x", "resnet18\n"):
        with pytest.raises(ValueError, match="timm has no model"):
            create_backbone(name, channels=3, size=32)
        with pytest.raises(ValueError, match="neither a run"):
            open_model(name, pretrained=True)
    assert isinstance(create_backbone("resnet18", channels=3, size=32), nn.Module)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: light_resnet", "name: hf-hub:someone/model", 1))
    config.write_text(config.read_text().replace("pretrained: false", "pretrained: true", 1))
    opened = open_run(run)
    assert opened.backbone().state_dict().keys() == opened.weights.keys()
    with pytest.raises(ValueError, match=r"started from the weights of hf-hub:someone/model.* baselines=false"):
        opened.untrained()
    shutil.rmtree(run / "backbone")
    with pytest.raises(ValueError, match="is looked up on a network"):
        open_run(run).backbone()


def test_a_model_of_the_hub_is_its_description_and_its_safetensors_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(owner: str, file: str, revision: str | None = None) -> str:
        asked.append((owner, file, revision))
        return str(run / "backbone" / file)

    monkeypatch.setattr(timm_format, "hf_hub_download", download)
    opened = open_model("hf-hub:someone/model@main", pretrained=True)
    assert set(asked) == {("someone/model", file, "main") for file in ("config.json", "model.safetensors")}
    assert all(
        torch.equal(value, open_run(run).weights[name]) for name, value in opened.backbone().state_dict().items()
    )


def test_nothing_listens_and_no_network_is_asked_from_pretraining_to_the_report(tmp_path: Path) -> None:
    program = """
import os, pathlib, sys
ASKED = []
FAMILIES = {2, 10}  # of IPv4 and IPv6; workers and the screen have sockets that are files

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto") and arguments[0].family in FAMILIES:
        ASKED.append((event, arguments[1]))
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "os.system"):
        ASKED.append((event, *arguments[:2]))

def listening():
    own = {os.readlink(entry) for entry in pathlib.Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]

from manyviews import cli as command
from manyviews.run.folder import Run
sys.addaudithook(watch)
HEARD = []
log = Run.log
def logged(*arguments):
    HEARD.extend([*listening(), "logged"])
    return log(*arguments)
Run.log = logged
small = ["data.holdout=0.3", "data.size=8", "data.memory=0", "views.size=28"]
small += ["train.batch_size=8", "train.epochs=0.2", "train.workers=1"]
assert command.pretrain(["quickstart", f"data={sys.argv[1]}", f"output={sys.argv[2]}", *small]) == 0
assert command.evaluate([sys.argv[2], "tasks=geometry", "maps=[pca]"]) == 0
assert command.extract([sys.argv[2], f"output={sys.argv[2]}-features"]) == 0
HEARD.extend(listening())
assert set(HEARD) == {"logged"}, HEARD
assert not ASKED, ASKED
"""
    words = [sys.executable, "-c", program, str(photographs(tmp_path / "images", 12)), str(tmp_path / "run")]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "run" / "report.html").exists()


def test_of_a_folder_in_timms_format_only_what_is_known_is_believed(run: Path, no_network: None) -> None:
    backbone, planted = run / "backbone", run.parent / "planted"
    description = json.loads((backbone / "config.json").read_text())
    hostile = {"url": "https://example.org/x.pth", "hf_hub_id": "someone/x", "custom_load": True, "source": "url"}
    hostile |= {"file": "/etc/passwd", "state_dict": {"a": 1}, "hf_hub_filename": "x", "unknown": 1}
    change(backbone / "config.json", pretrained_cfg=description["pretrained_cfg"] | hostile)
    (backbone / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(planted)))
    learned = open_model(f"local-dir:{backbone}", pretrained=True)
    assert all(torch.equal(value, open_run(run).weights[name]) for name, value in learned.weights.items())
    (backbone / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        open_model(f"local-dir:{backbone}", pretrained=True)
    assert not planted.exists()
    for values, message in (
        ({"architecture": "os.system"}, "timm has no model 'os.system'"),
        ({"architecture": "../x"}, "architecture: String should match pattern"),
        ({"architecture": None}, "architecture: Input should be a valid string"),
        ({"pretrained_cfg": []}, "is damaged"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "less than or equal to 4096"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "std": [0.0]}}, "greater than 0"),
        ({"model_args": {"embed_dim": 10**9}}, "with embed_dim=1000000000, which is not read from a folder"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "which is not read from a folder"),
        ({"model_args": [1]}, "arguments: Input should be a valid dict"),
    ):
        (backbone / "config.json").write_text(json.dumps(description | values))
        with pytest.raises(ValueError, match=message):
            open_model(f"local-dir:{backbone}", pretrained=False)


def test_timm_itself_still_reads_what_is_exported(run: Path) -> None:
    there = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True)
    here = create_backbone(f"local-dir:{run / 'backbone'}", channels=1, size=28, pretrained=True)
    assert all(torch.equal(value, here.state_dict()[name]) for name, value in there.state_dict().items())
    assert read_folder(run / "backbone").described.input_size == (1, 28, 28)


DAMAGE = {
    "config.yaml": [
        (b"", "it is empty"),
        (b"[" * 9999, "nested"),
        (b"seed: -1", "seed"),
        (b"\xff", "UTF-8"),
    ],
    "backbone/config.json": [
        (b"{}", "damaged"),
        (b"[" * 99_999, "nested too deep"),
        (b'{"pretrained_cfg": 3}', "damaged"),
    ],
    "backbone/model.safetensors": [
        (b"", "damaged"),
        (b"\xff" * 99, "header should have"),
        (b"\x02" + bytes(7) + b"{}", ""),
    ],
}


@pytest.mark.parametrize(("file", "content", "words"), [(file, *one) for file, all in DAMAGE.items() for one in all])
def test_damage_in_a_run_is_one_sentence(
    run: Path, file: str, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / file).write_bytes(content)
    assert cli.evaluate([str(run), *QUIET]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "file", ["config.yaml", "backbone/model.safetensors", "evaluation.json", "outcomes.safetensors"]
)
def test_a_link_out_of_a_run_is_neither_read_nor_written_through(run: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((run / file).read_bytes() if (run / file).exists() else b"precious")
    before = outside.read_bytes()
    (run / file).unlink(missing_ok=True)
    (run / file).symlink_to(outside)
    assert cli.evaluate([str(run), *QUIET]) == 2
    assert outside.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["backbone", "tensorboard", "checkpoints/step-000000009", ".lock", ".done.partial", "metrics.jsonl", "done"]
)
def test_a_resume_neither_writes_nor_removes_through_a_link_out_of_the_run(
    run: Path, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "events.out.tfevents.1").write_text("precious")
    target = mine if name in ("backbone", "tensorboard") or "/" in name else mine / "events.out.tfevents.1"
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(ValueError, match="is a symbolic link out of"):
        prepare(run, resume=True)
    assert (mine / "events.out.tfevents.1").read_text() == "precious"
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_link_in_place_of_begun_features_is_not_written_through(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for place in ("features/backbone-x/.partial", "tensorboard"):
        (run / place).mkdir(parents=True)
        (run / place / "done-00000.txt").symlink_to(tmp_path / "precious")
        with pytest.raises(ValueError, match="is a symbolic link out of"):
            open_run(run)
        shutil.rmtree(run / place)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_manifest_of_features_that_names_other_files_deletes_none(tmp_path: Path) -> None:
    precious = tmp_path / "precious.npy"
    precious.touch()
    place = tmp_path / "features"
    for name in ("../precious.npy", str(precious), "..", "a/b.npy", 3, None, "x.py"):
        place.mkdir()
        (place / "manifest.json").write_text(json.dumps({"files": [name]}))
        with pytest.raises(ValueError, match="its files are not named, or lie elsewhere"):
            store.read_manifest(place)
        store.remove(place)
        shutil.rmtree(place)
    assert precious.exists()


def test_features_that_could_run_code_are_computed_anew(run: Path, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "images", 6)
    words = [f"data={folder}", "data.size=28", "data.channels=1", f"output={tmp_path / 'features'}"]
    extract(run, load(ExtractSettings, None, words))
    rows = np.load(tmp_path / "features/backbone.npy")
    np.save(tmp_path / "features/backbone.npy", np.array([Planted(tmp_path / "planted")], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"backbone\.npy cannot be read"):
        extract(run, load(ExtractSettings, None, words))
    extract(run, load(ExtractSettings, None, [*words, "overwrite=true"]))
    assert np.array_equal(np.load(tmp_path / "features/backbone.npy"), rows)
    assert not (tmp_path / "planted").exists()


def test_a_planted_pickle_beside_a_checkpoint_is_never_opened(run: Path, tmp_path: Path) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    for name in ("optimiser.pt", "encoder.pkl", "pytorch_model.bin", "model.pth"):
        for place in (checkpoint, run, run / "backbone"):
            (place / name).write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    data = f"data={photographs(tmp_path / 'images', 6)}"
    assert cli.evaluate([str(run), data, "data.size=28", "data.channels=1", *QUIET]) == 0
    shutil.rmtree(run / "backbone")
    open_run(run)
    assert not (tmp_path / "planted").exists()


def test_records_that_a_stranger_wrote_are_not_taken_for_measured(run: Path) -> None:
    settings, opened = load(EvaluateSettings, None, QUIET), open_run(run)
    outcomes = run / "outcomes.safetensors"
    save_file({"hits/knn/learned": torch.ones(3, dtype=torch.int64)}, outcomes)
    known = {"outcomes": sha256(outcomes), "weights": dict(opened.origin), "images": ["0" * 64], "precision": "fp32"}
    known |= settings.model_dump(mode="json", include={"protocol", "metric"})
    shared = Shared(opened.recipe.data.build().test, ["0" * 64], labelled=True)

    def measured(record: object) -> bool:
        (run / "evaluation.json").write_text(json.dumps(record))
        return measured_before(opened, shared, settings) is not None

    row = {"task": "geometry", "features": "learned", "metric": "uniformity", "value": -2.0}
    assert measured(known | {"measurements": [row]})
    for wrong in (3, [3], [{}], {"a": 1}, [row | {"value": "a"}], [row | {"value": None}]):
        assert not measured(known | {"measurements": wrong})
    lists = ({"geometry": 3}, {"geometry": [3]}, {"geometry": [{"features": "learned"}]}, {"scores": [{}]})
    for wrong in (*lists, {"figures": {"a": 1}}, {"fractions": 1}, {}):
        assert not measured(known | wrong)
    assert not measured([known])
    assert not measured(known | {"outcomes": "0" * 64})
    (run / "evaluation.json").write_bytes(b"[" * 99_999)
    assert measured_before(opened, shared, settings) is None
    save_file({"hits/knn/learned": torch.ones(3)}, outcomes)
    assert not measured(known | {"measurements": [row], "outcomes": sha256(outcomes)})
