"""Runs that are trained by relations: what they are made of, refuse and resume."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_extend import SMALL, config, images, stopped
from torch import Tensor

import manyviews
from manyviews.config import load, validate
from manyviews.data import Loader, Order, RelationTable, Sample
from manyviews.data.decoding.files import Files
from manyviews.data.images import Pictures
from manyviews.features.backbone import open_run
from manyviews.features.encoding import EncodeSettings, images_of
from manyviews.recipe import Recipe
from manyviews.run.folder import read_metrics
from manyviews.system.console import Console
from manyviews.train import pretrain as loop
from manyviews.train.components import Components
from manyviews.train.pretrain import pretrain
from manyviews.train.relations import lists_of, relations_of
from manyviews.train.setup import read_images
from processes import launched
from stopped_runs import content, differing

COUNT = 24
OBJECTIVES = {"pairs": "contrastive", "triplets": "triplet", "ranked": "triplet"}
WORDS = (
    *SMALL,
    "data.holdout=0",
    "views.num_views=1",
    "train.batch_size=12",
    "train.epochs=2",
)


def recipe(run: Path, data: Path, *words: str) -> Recipe:
    """Small settings, of which the later ones count."""
    given = {word.partition("=")[0]: word for word in (*WORDS, f"data={data}", f"output={run}", *words)}
    return load(Recipe, None, list(given.values()))


def write(path: Path, kind: str) -> Path:
    """Relations by the number of an image, which stands in its name: even with even."""
    names = [f"{index:02d}.png" for index in range(COUNT)]
    lines = {
        "pairs": [
            "a,b,same",
            *(
                f"{a},{b},{int((i + j) % 2 == 0)}"
                for i, a in enumerate(names)
                for j, b in [(i // 2 + 13, names[i // 2 + 12])]
                if a != b
            ),
        ],
        "triplets": [
            "anchor,positive,negative",
            *(f"{names[i]},{names[(i + 2) % COUNT]},{names[(i + 3) % COUNT]}" for i in range(COUNT)),
        ],
        "ranked": [
            "query,items",
            *(",".join(names[(i + step) % COUNT] for step in range(1 + i % 6 + 1)) for i in range(COUNT)),
        ],
        "sets": ["name,set", *(f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names[:20]))],
    }
    path.write_text("\n".join(lines[kind]) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "data", COUNT)


def run_of(run: Path, data: Path, relations: Path, kind: str, *words: str) -> Recipe:
    size = ("train.items_per_query=3",) if kind == "ranked" else ()
    objective = f"objective={OBJECTIVES[kind]}"
    return recipe(run, data, objective, f"data.relations={relations}", *size, *words)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_by_relations_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    kind: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relations = write(tmp_path / f"{kind}.csv", kind)
    straight = pretrain(run_of(tmp_path / "straight", data, relations, kind))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"relations {'23 pairs' if kind == 'pairs' else '24 triplets' if kind == 'triplets' else '24 ranked lists'}"
        in said
    )
    assert "negatives" not in said
    run = stopped(monkeypatch, 3, run_of(tmp_path / "run", data, relations, kind))
    pretrain(run_of(run, data, relations, kind, "resume=true"))
    assert differing(content(straight), content(run)) == []
    losses = [line["loss"] for line in read_metrics(straight)]
    assert losses == [line["loss"] for line in read_metrics(run)]
    assert config(run).data.relations == str(relations)


def on_two_ranks(root: str) -> None:
    folder = Path(root)
    relations = folder / "triplets.csv"
    pretrain(run_of(folder / "straight", folder / "data", relations, "triplets"))
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 3, run_of(folder / "run", folder / "data", relations, "triplets"))
    pretrain(run_of(folder / "run", folder / "data", relations, "triplets", "resume=true"))


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_by_the_same_relations(tmp_path: Path, data: Path) -> None:
    write(tmp_path / "triplets.csv", "triplets")
    launched(on_two_ranks, str(tmp_path), count=2)
    assert differing(content(tmp_path / "straight"), content(tmp_path / "run")) == []


def test_a_file_of_relations_may_move_and_be_sorted_but_not_change(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relations = write(tmp_path / "triplets.csv", "triplets")
    run = stopped(monkeypatch, 3, run_of(tmp_path / "run", data, relations, "triplets"))
    header, *lines = relations.read_text().splitlines()
    moved = tmp_path / "sorted.csv"
    moved.write_text("\n".join([header, *reversed(lines)]))
    relations.write_text("\n".join([header, *lines[1:]]))
    with pytest.raises(ValueError, match=r"the relations are not those that the run was started with .* start another"):
        pretrain(run_of(run, data, relations, "triplets", "resume=true"))
    with pytest.raises(ValueError, match=r"data.relations was .*triplets.csv and is null"):
        pretrain(recipe(run, data, "objective=triplet", "views.num_views=2", "resume=true"))
    pretrain(run_of(run, data, moved, "triplets", "resume=true"))
    assert config(run).data.relations == str(moved)


SETS = ("objective=supervised", "ids=labels", "data.relations={sets}")
TRIPLETS = ("objective=triplet", "data.relations={triplets}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("objective=bank", "data.relations={triplets}", "views.num_views=1"),
            r"objective=bank is not trained by triplets, which .* use objective=.*triplet",
        ),
        (("objective=contrastive", "data.relations={triplets}"), "objective=contrastive is not trained by triplets"),
        ((*TRIPLETS, "ids=labels"), r"ids=labels makes classes .* or similar sets \(name,set\)"),
        ((*TRIPLETS, "train.drop_last=false"), "train.drop_last=false does not go with data.relations"),
        (
            (*TRIPLETS, "train.items_per_query=4"),
            r"train.items_per_query=4 is for ranked lists .* holds triplets; leave",
        ),
        ((*TRIPLETS, "train.batch_size=16"), "train.batch_size=16 does not hold whole lists of 3 images.* use 15"),
        ((*TRIPLETS, "train.batch_size=75"), "24 triplets are fewer than the 25 .* use train.batch_size=72"),
        ((*SETS, "unrelated=negatives"), "unrelated=negatives is for pairs, triplets and ranked lists"),
        (("objective=supervised", "data.relations={sets}"), "views.num_views=1, but objective=supervised contrasts at"),
        ((*SETS, "data.labels={labels}"), r"has sets, which are classes, and data.labels=.*labels.csv has classes too"),
        (
            ("objective=triplet", "data.relations={gone}"),
            r"data.relations=.*gone.csv does not exist; .*data.relations=null",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    words: Sequence[str], message: str, tmp_path: Path, data: Path
) -> None:
    files = {kind: write(tmp_path / f"{kind}.csv", kind) for kind in ("triplets", "sets")} | {
        "gone": tmp_path / "gone.csv",
        "labels": write(tmp_path / "labels.csv", "sets"),
    }
    with pytest.raises(ValueError, match=message):
        pretrain(recipe(tmp_path / "run", data, *(word.format(**files) for word in words)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["unrelated=negatives", "train.items_per_query=3"])
def test_settings_of_relations_without_a_file_of_them_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"data.relations=FILE, or leave it out"):
        load(Recipe, None, [word])
    with pytest.raises(ValueError, match=r"did you mean data\.relations"):
        load(Recipe, None, ["relations=pairs.csv"])


def test_sets_are_the_classes_of_training_and_of_all_measurements(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = write(tmp_path / "sets.csv", "sets")
    words = [word.format(sets=sets) for word in SETS]
    run = pretrain(recipe(tmp_path / "run", data, *words))
    assert "2 sets of sets.csv are the classes" in " ".join(capsys.readouterr().out.split())
    split = images_of(open_run(run), EncodeSettings(), Console(quiet=True))
    assert split.train.classes == ("even", "odd")
    assert split.train.labels is not None
    assert split.train.labels.tolist() == [0, 1] * 10 + [-1] * 4
    pretrain(recipe(tmp_path / "other", data, "views.num_views=2", f"data.relations={sets}"))
    assert "nothing is learned with ids=images" in " ".join(capsys.readouterr().out.split())


def test_images_of_held_out_and_unseen_classes_are_left_out_of_the_relations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = Sample().build()
    assert split.test is not None
    assert split.train.labels is not None
    held_out, unseen = split.test.names[0], split.train.names[int((split.train.labels == 8).nonzero()[0])]
    seen = [split.train.names[index] for index in (split.train.labels == 0).nonzero().flatten()[:2].tolist()]
    file = tmp_path / "pairs.csv"
    file.write_text(f"a,b,same\n{seen[0]},{seen[1]},1\n{held_out},{seen[0]},1\n{seen[1]},{unseen},0\n")
    made = load(Recipe, None, ["objective=contrastive", "unseen=[Bag]", f"data.relations={file}"])
    console = Console()
    read = read_images(made, tmp_path / "run", console)
    table = relations_of(made, read, console)
    assert table is not None
    assert [read.train.names[image] for image in table.ids.flatten().tolist()] == sorted(seen)
    assert "left out 2 of 3 relations" in " ".join(capsys.readouterr().out.split())


def test_a_file_that_became_unreadable_is_in_no_relation(tmp_path: Path, data: Path) -> None:
    made = recipe(tmp_path / "run", data, "views.num_views=2", "data.memory=0", "data.max_bad=0.5")
    split = made.data.build()
    assert isinstance(split.train, Files)
    table = RelationTable("triplets", torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(2))
    lists = lists_of(made, table)
    assert lists is not None
    (data / "01.png").write_bytes(b"no image")
    batches = iter(Loader(split.train, Order(3, 3, seed=0)))
    ids = next(batches).ids
    assert 1 not in ids.tolist()
    swapped = torch.tensor([[0, 1, 2], [3, 4, 5]])
    swapped[0, 1] = ids[[*Order(3, 3, seed=0).batch(0)[1].tolist()].index(1)]
    assert lists.relevances(swapped)[1].tolist() == [[False, False], [True, True]]


def test_pairs_are_looked_up_in_either_direction() -> None:
    made = load(Recipe, None, ["objective=contrastive", "data.relations=pairs.csv", "unrelated=negatives"])
    lists = lists_of(made, RelationTable("pairs", torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.25, 1.0])))
    assert lists is not None
    assert lists.others
    relevances, there = lists.relevances(torch.tensor([[1, 0], [2, 3], [1, 2]]))
    assert relevances.flatten().tolist() == [0.25, 1.0, 0.0]
    assert there.flatten().tolist() == [True, True, False]


def test_a_program_passes_relations_with_its_dataset(tmp_path: Path) -> None:
    class Numbers:
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Image.Image:
            return Image.new("L", (16, 16), 20 * index)

    file = tmp_path / "pairs.csv"
    file.write_text("a,b,same\n" + "".join(f"Numbers/train/{i:05d},Numbers/train/{i + 1:05d},1\n" for i in range(11)))
    data = manyviews.of_dataset(Numbers(), relations=file)
    made = validate(Recipe, {"data": data, "objective": {"name": "contrastive"}})
    console = Console(quiet=True)
    table = relations_of(made, read_images(made, tmp_path / "run", console), console)
    assert table is not None
    assert table.ids.tolist() == [[i, i + 1] for i in range(11)]
    assert validate(Recipe, made.model_dump(mode="json")).data.relations == str(file)


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The ids of every batch that is trained on."""
    seen: list[Tensor] = []
    original = loop.train_step

    def look(components: Components, batch: Pictures, ids: Tensor, epoch: int, step: int) -> object:
        seen.append(ids.clone())
        return original(components, batch, ids, epoch, step)

    monkeypatch.setattr(loop, "train_step", look)
    return seen


def test_an_epoch_is_a_pass_over_the_relations(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by(monkeypatch)
    pretrain(run_of(tmp_path / "run", data, write(tmp_path / "triplets.csv", "triplets"), "triplets", "train.epochs=1"))
    assert sorted(torch.cat(seen).view(-1, 3).tolist()) == [[i, (i + 2) % COUNT, (i + 3) % COUNT] for i in range(COUNT)]


def test_images_of_no_relation_join_a_batch_as_negatives(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, seen = tmp_path / "pairs.csv", seen_by(monkeypatch)
    file.write_text("a,b,same\n" + "".join(f"{i:02d}.png,{i + 1:02d}.png,1\n" for i in range(0, 16, 2)))
    words = ("train.batch_size=8", "train.epochs=1", "unrelated=negatives", "train.unrelated=4")
    run = pretrain(run_of(tmp_path / "run", data, file, "pairs", *words))
    said = " ".join(capsys.readouterr().out.split())
    assert "8 pairs, of 16 images; a batch has 2 and 4 images of none" in said
    assert all(int((ids >= 16).sum()) == 4 for ids in seen)
    # Of two queries with a pair 6 images each, of two without one 7.
    assert {line["negatives"] for line in read_metrics(run) if "negatives" in line} == {6.5}
    with pytest.raises(ValueError, match=r"train.unrelated=4 images of a batch would be ignored; set unrelated="):
        run_of(tmp_path / "run", data, file, "pairs", "train.unrelated=4")
