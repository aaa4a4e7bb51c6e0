"""The Python interface: the same runs as by the command line, twice in a process, and in a notebook."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import manyviews
from manyviews import cli

TRAIN: dict[str, Any] = {"batch_size": 32, "epochs": 0.0064, "precision": "fp32", "threads": 1, "log_every": 1}
TRAIN |= {"monitor": 0, "preview": 0}
ARGS = [f"train.{key}={value}" for key, value in TRAIN.items()]
NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> manyviews.Run:
    return manyviews.pretrain(output=str(tmp_path_factory.mktemp("runs") / "run"), train=TRAIN)


def trained(folder: Path) -> tuple[list[Any], list[dict[str, Any]], str]:
    """Weights, metrics without times, and the configuration without the folder."""
    weights = load_file(folder / "backbone" / "model.safetensors")
    timed = {"seconds", "images_per_second"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = (folder / "config.yaml").read_text().replace(str(folder), "FOLDER")
    return (
        sorted((name, value.tolist()) for name, value in weights.items()),
        [{key: value for key, value in line.items() if key not in timed} for line in lines],
        config,
    )


def test_the_command_line_and_python_give_the_same_run_bit_by_bit(run: manyviews.Run, tmp_path: Path) -> None:
    assert cli.pretrain(["quickstart", f"output={tmp_path / 'run'}", *ARGS]) == 0
    assert trained(tmp_path / "run") == trained(run.folder)


def test_nested_settings_choose_an_objective_as_its_keys_do(tmp_path: Path) -> None:
    queue = {"name": "queue", "size": 64}
    run = manyviews.pretrain("simclr", output=str(tmp_path / "a"), objective=queue, optim={"rate": 0.01}, train=TRAIN)
    args = ["simclr", f"output={tmp_path / 'b'}", "objective=queue", "objective.size=64", "optim.rate=0.01", *ARGS]
    assert cli.pretrain(args) == 0
    weights, metrics, _ = trained(run.folder)
    assert (weights, metrics) == trained(tmp_path / "b")[:2]
    assert run.config.objective.name == "queue"


def test_a_wrong_setting_is_a_value_error_with_the_right_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no key train\.epoch.*train\.epochs"):
        manyviews.pretrain(output=str(tmp_path / "run"), train={"epoch": 3})
    with pytest.raises(ValueError, match="is not a setting"):
        manyviews.pretrain(output=str(tmp_path / "run"), seed=object())
    with pytest.raises(ValueError, match="is not a run folder"):
        manyviews.Run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_each_line_of_metrics_is_passed_on_and_a_callback_that_fails_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Mapping[str, float]] = []

    def on_metrics(line: Mapping[str, float]) -> None:
        lines.append(line)
        raise RuntimeError("no such tracker")

    run = manyviews.pretrain(output=str(tmp_path / "run"), train=TRAIN, on_metrics=on_metrics)
    assert [line["step"] for line in lines] == [line["step"] for line in run.metrics()] == [1, 2]
    assert [line["loss"] for line in lines] == [line["loss"] for line in run.metrics()]
    assert "no such tracker" in capsys.readouterr().out


def test_an_interrupt_saves_and_resume_ends_with_the_same_bits(run: manyviews.Run, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")

    def interrupt(_: Mapping[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        manyviews.pretrain(output=folder, train=TRAIN, on_metrics=interrupt)
    again = manyviews.pretrain(output=folder, train=TRAIN, resume=True)
    assert trained(again.folder)[:2] == trained(run.folder)[:2]


def test_a_run_embeds_one_image_or_many_and_has_its_backbone(run: manyviews.Run, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    rows = run.embed(images)
    assert rows.shape == (3, 1152)
    Image.fromarray(images[1]).save(tmp_path / "one.png")
    for one in (Image.fromarray(images[1]), tmp_path / "one.png", str(tmp_path / "one.png")):
        np.testing.assert_allclose(run.embed(one), rows[1], atol=1e-5)
    pixels = (torch.from_numpy(images).unsqueeze(1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(run.backbone()(pixels).detach().numpy(), rows, atol=1e-4)


def test_a_run_is_evaluated_extracted_and_finetuned(run: manyviews.Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call evaluate"):
        run.scores()
    scores = run.evaluate(tasks=["knn"], maps=[], baselines=False)
    assert scores == manyviews.Run(run.folder).scores()
    assert {row["features"] for row in scores} == {"learned"}
    folder = manyviews.extract(run, output=tmp_path / "features")
    assert np.load(folder / "backbone.npy").shape[1] == 1152
    short = {"epochs": 0.1, "min_steps": 1, "warmup_steps": 0}
    classifier = manyviews.finetune(run, output=tmp_path / "classifier", fraction=0.01, **short)
    assert (classifier / "result.json").is_file()


def test_an_objective_outside_of_the_package_trains_resumes_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (NOTEBOOK.parent / "add_objective.md").read_text()
    file, program = (page.split(f"<!-- {mark} -->\n```python\n")[1].split("```")[0] for mark in ("file", "outside"))
    (tmp_path / "uniformity.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    short = program.replace('output="', f'train={TRAIN!r}, output="').replace(
        "evaluate()", 'evaluate(tasks=["knn"], maps=[], baselines=False)'
    )
    exec(short, names := {})
    run = names["run"]
    assert (type(run.config.objective).__module__, run.config.objective.weight) == ("uniformity", 0.5)
    assert run.metrics()[-1]["uniformity"] < 0
    assert run.scores()
    # The words of the command line do as well, where the class is known.
    args = [f"output={tmp_path / 'again'}", "objective=uniformity", "objective.weight=0.5", *ARGS]
    assert cli.pretrain(args) == 0
    assert trained(tmp_path / "again")[:2] == trained(run.folder)[:2]
    assert cli.pretrain([*args, "resume=true"]) == 0


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert shown[0] == "Run('runs/notebook')"
    assert shown[-2:] == ["(3, 1152)", "torch.Size([1, 1152])"]
