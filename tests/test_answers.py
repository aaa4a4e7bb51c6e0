"""What a person typed wrong is answered by the field's own term, the bound, and the way out."""

import re
from pathlib import Path

import pytest

from manyviews.cli import own_data
from manyviews.config import dump_yaml, load
from manyviews.data import shorthand
from manyviews.evaluation import EvaluateSettings
from manyviews.recipe import Recipe, find
from manyviews.train.finetune import FinetuneSettings


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        ("objective=NTXentLoss", "NT-Xent (InfoNCE) is objective=in_batch, as in recipe simclr"),
        ("objective=SupConLoss", "SupCon is objective=supervised with ids=labels, as in recipe supervised"),
        ("objective=ArcFaceLoss", "ArcFace is objective=margin_softmax objective.preset=arcface, as in recipe arcface"),
        ("objective=byol", "it has no negatives and is not here; the nearest that is: objective=queue"),
        ("objective=vicreg", "it decorrelates dimensions and is not here; the nearest that is: objective=in_batch"),
        ("objective=proxy_nca", "objective=margin_softmax objective.preset=norm_face"),
        ("objective=margin_softmax objective.preset=lmcl", "LMCL (AM-Softmax) is objective.preset=cosface"),
        ("objective=margin_softmax objective.preset=A-Softmax", "A-Softmax is objective.preset=sphereface"),
        ("objective=triplet objective.sampling=batch_hard", "(Hermans et al. 2017) is objective.sampling=hardest"),
        ("objective=triplet objective.sampling=semi-hard", "did you mean semi_hard?"),
        ("objective=margin_softmax objective.m=0.5", "did you mean objective.m2?"),
        ("objective=queue objective.m=0.99", "did you mean objective.momentum?"),
        ("objective=bank objective.m=4096", "did you mean objective.negatives?"),
        ("objective=triplet objective.m=0.2", "did you mean objective.margin?"),
        (
            "objective.m=0.5",
            "objective.m2 belongs to objective=margin_softmax, objective.momentum belongs to objective=",
        ),
        ("objective=triplet objective.sampling.cutoff=1", "it belongs to objective.sampling=distance_weighted"),
        ("optim=adam", "Adam is optim=adamw with optim.weight_decay=0"),
        ("optim.scheduler=cosine", "falls along a cosine; there is no other schedule"),
        ("scheduler=step", "falls along a cosine; there is no other schedule"),
        ("encoder.projector=mlp", "it has no kinds to choose from; set its layers, hidden, dim, batch_norm"),
        ("views.crop_scale=0.2", "it must be a list, [float, float] | null; write it as views.crop_scale=[a,b]"),
        ("views.crop_scale=1,0.2", "views: crop_scale is [1.0, 0.2]; it must be [smallest, largest]"),
        ("train.epochs=ten", "train.epochs=ten: it must be float > 0"),
        ("train.batch_size=many", "train.batch_size=many: it must be int ≥ 2"),
        ("resume=perhaps", "resume=perhaps: it must be bool"),
        ("unseen=", "unseen has no value; write unseen=[] for none"),
        ("train.chunk=", "train.chunk has no value; write train.chunk=null for none"),
        ("train.epochs=", "train.epochs has no value; it must be float > 0"),
    ],
)
def test_a_mistyped_word_is_answered_by_the_term_the_bound_and_the_way_out(args: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(answer)):
        load(Recipe, None, args.split())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("train:\n\tepochs: 3\n", "line 2: a tab cannot indent a line of YAML; use spaces"),
        ("- seed: 1\n", "holds a list; a recipe holds `key: value`, one on each line"),
        ("seed: 1\nseed: 2\n", "line 2: it is not YAML that can be read: found duplicate key seed"),
        ('{"seed": 1, "train": {"epochs": 3,}', "line 1: it is not YAML that can be read"),
        (" \n", "it is empty"),
        ("objective:\n  triplet:\n    margin: 0.2\n", "triplet is a kind; write objective.name=triplet, and its keys"),
        ("objective.name: queue\n", "the key objective.name has a dot, as on a command line; in a recipe it is nested"),
        (
            "train:\n  minutes: 2h\n",
            "train.minutes=2h: it must be float | null > 0 ≤ 10000000 (Wall-clock minutes of training",
        ),
        ("train:\n  epochs: [1, 2]\n", "train.epochs=[1, 2]: it must be float > 0 ≤ 1000000 (Passes over the images"),
        ("trainer:\n  max_epochs: 10\n", "there is no key trainer.max_epochs; did you mean train.epochs?"),
        ("_base_: [simclr.py]\n", "a recipe stands alone: begin with the other one and add key=value"),
        ("loss: NTXentLoss\n", "there is no key loss; did you mean objective?"),
        ("ids: labels\nobjective:\n  name: triplet\n  mining: hard\n", "did you mean objective.sampling?"),
        ("objective:\n  name: ArcFaceLoss\n  s: 64\n", "objective=margin_softmax objective.preset=arcface"),
    ],
)
def test_a_wrong_recipe_is_answered_on_one_line_for_each_mistake(text: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(answer)) as refused:
        load(Recipe, tmp_path / "recipe.yaml")
    assert "\n" not in str(refused.value)


def test_a_list_needs_no_brackets() -> None:
    assert load(Recipe, None, ["views.crop_scale=0.2,1"]).views.crop_scale == (0.2, 1.0)
    assert load(Recipe, None, ["optim.betas=0.9,0.95"]).optim.betas == (0.9, 0.95)
    assert load(EvaluateSettings, None, ["protocol.knn.neighbours=5,20"]).protocol.knn.neighbours == (5, 20)


@pytest.mark.parametrize("name", ["NT-Xent", "ntxentloss", "InfoNCE", "SupCon Loss"])
def test_a_recipe_is_named_for_a_loss_however_it_is_written(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean (simclr|supervised)\?$"):
        find(name)


@pytest.mark.parametrize("model", [EvaluateSettings, FinetuneSettings])
def test_a_part_of_the_runs_own_data_is_changed_alone(model: type, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    args = [f"data={tmp_path / 'images'}", "data.size=24"]
    (tmp_path / "config.yaml").write_text(dump_yaml(load(Recipe, None, args)))
    changed = [f"data.test={tmp_path}"]
    data = load(model, None, changed, base=own_data(tmp_path, changed)).data
    assert (data.path, data.size, data.test) == (str(tmp_path / "images"), 24, str(tmp_path))
    assert own_data(tmp_path, ["data=sample", "data.test=x"]) == own_data(tmp_path, ["workers=1"]) == {}
    with pytest.raises(ValueError, match=r"data\.test is a part of data, but no data is chosen: write data=… too"):
        load(model, None, changed)


def test_a_data_set_beside_a_folder_of_its_name_says_which_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shorthand("cifar10") == {"name": "cifar10"}
    assert not caplog.records
    (tmp_path / "cifar10").mkdir()
    assert shorthand("cifar10") == {"name": "cifar10"}
    assert "data=cifar10 is the data set of that name; data=./cifar10 reads the folder" in caplog.text
    assert shorthand("./cifar10") == {"name": "folder", "path": "./cifar10"}
