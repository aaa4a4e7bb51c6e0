"""The commands in README and docs/ run, page by page, on small images and with short budgets."""

import importlib.util
import re
import shlex
import shutil
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from PIL import Image

import manyviews
from manyviews import cli
from manyviews.data import Sample
from pages import PAGES, ROOT, commands

SHORT = {"epochs": 0.6, "threads": 1, "monitor": 0, "preview": 0, "batch_size": 120}
EXTRA = {
    "pretrain": [f"train.{key}={value}" for key, value in SHORT.items()],
    "evaluate": [
        "protocol.linear.regularisations=[0.1]",
        "protocol.knn.neighbours=[5]",
        "few.shares=[0.1]",
        "few.shots=[]",
        "few.draws=2",
    ],
    "finetune": ["epochs=1", "min_steps=1", "warmup_steps=0"],
}
"""Settings that are added to a command, so that it takes seconds."""

RELATIONS = {
    "triplets.csv": ("anchor,positive,negative", 3, ("",)),
    "sets.csv": ("name,set", 1, (",x", ",y")),
}
"""Files of relations: the header, the images of a line, and how lines end in turns."""

NOT_RUN = {
    r"^make quickstart$": "installs torch into .venv; the four commands that it then runs are on the pages",
    r"^make test$": "starts these tests",
    r"^(accelerate launch|torchrun) .*--num_machines|--nnodes": "needs two machines; test_layout parses the arguments",
    r"^(accelerate launch|torchrun) ": "tests/system/test_launch.py starts launchers; test_layout parses the arguments",
    r"^python3? scripts/gpu_check.py ": "tests/test_gpu_check.py runs all of it in small",
    r"^scripts/gpu_wheels.sh |^python3 -m pip install": "needs a network, and a machine without one",
    r"^python scripts/benchmark.py ": "tests/test_benchmarks.py runs every benchmark in small",
    r"objective=uniformity": "tests/objectives/test_new_objective.py runs it in a copy of the package",
}
"""Commands that this test leaves out: a pattern, and why."""

WITH_COMMANDS = {page: [line.strip() for line in commands(page) if line.strip()] for page in PAGES}
RUN = {
    page: [line for line in lines if not any(re.search(pattern, line) for pattern in NOT_RUN)]
    for page, lines in WITH_COMMANDS.items()
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders by class, the same images with a table of labels, and three runs, of which two are seeds."""
    root = tmp_path_factory.mktemp("work")
    train = Sample().build().train
    assert train.labels is not None
    rows = []
    pixels = train.read(torch.arange(300)).squeeze(1).numpy()
    for number, label in enumerate(train.labels[:300].tolist()):
        name = f"{train.classes[label].replace('/', '-')}/{number}.png"
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(root / "photos" / name)
        rows.append(f"{name},{label}")
    names = [row.split(",")[0] for row in rows]
    ranked = [f"{query},{item},{number}" for query in names for number, item in enumerate(names[::2]) if item != query]
    (root / "ranked.csv").write_text("\n".join(["query,item,relevance", *ranked]) + "\n")
    (root / "labels.csv").write_text("\n".join(["name,label", *rows]) + "\n")
    for file, (header, count, ends) in RELATIONS.items():
        lines = [",".join(names[i : i + count]) + ends[i % len(ends)] for i in range(len(names) - count)]
        (root / file).write_text("\n".join([header, *lines]) + "\n")
    named = [row.split(",") for row in rows]
    pairs = [
        f"{one},{two},{int(kind == other)}" for (one, kind), (two, other) in pairwise(sorted(named, key=itemgetter(1)))
    ]
    pairs += [f"{one},{two},{int(kind == other)}" for (one, kind), (two, other) in pairwise(named)]
    (root / "pairs.csv").write_text("\n".join(["a,b,same", *dict.fromkeys(pairs)]) + "\n")
    for seed, name in enumerate(("mine", "other-0", "other-1")):
        data = {"name": "folder", "path": str(root / "photos"), "size": 16}
        manyviews.pretrain("simclr", data=data, output=root / "runs" / name, seed=seed, train=SHORT)
    return root


def arguments(command: str, work: Path) -> tuple[str, list[str]]:
    """The command's name, and its arguments with folders that exist and a short budget."""
    program, name, *args = shlex.split(command)
    assert program == "manyviews", command
    args = [re.sub(r"=(/my/images|/other/images|/photos|photos)$", f"={work / 'photos'}", arg) for arg in args]
    kept = "train.items_per_query="
    args = [arg for arg in args if arg.startswith(kept) or not arg.startswith(("train.", "data.size="))]
    files = {file: work / file for file in ("labels.csv", "pairs.csv", "ranked.csv", *RELATIONS)}
    # There are three held-out images of each of ten classes.
    replaced = {**files, "/fast/photos-224": work / "cache", "shots=1,5": "shots=1", "ways=5,20": "ways=5"}
    for shown, path in replaced.items():
        args = [arg.replace(shown, str(path)) for arg in args]
    photos = sorted((work / "photos").rglob("*.png"))
    args = [str(photos["ab".index(arg[0])]) if arg in ("a.jpg", "b.jpg") else arg for arg in args]
    if "facenet" in args:
        # Its 50 images of a class are more than there are.
        args += ["train.images_per_class=20", "train.batch_size=100"]
    if name == "pretrain" and not any(arg.startswith("data=") for arg in args):
        args.append(f"data={work / 'photos'}")
    if any(arg.startswith("data=") for arg in args):
        args.append("data.size=16")
    if "metric=lmnn" in args:
        args += ["metric.iterations=2", "baselines=false"]
    if importlib.util.find_spec("umap") is None:
        args = [arg for arg in args if arg != "maps=umap"]
    own = {arg.partition("=")[0] for arg in args}
    return name, [*args, *(extra for extra in EXTRA.get(name, []) if extra.partition("=")[0] not in own)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if not any("output=runs/mine" in line for line in RUN[page]):
        shutil.copytree(work / "runs", tmp_path / "runs")
    for line in RUN[page]:
        name, args = arguments(line, work)
        status = cli.COMMANDS[name](args)
        assert status == 0, f"{line}\n{capsys.readouterr().err}"


def test_each_reason_for_not_running_a_command_is_of_use() -> None:
    lines = [line for page in WITH_COMMANDS.values() for line in page]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert sum(map(len, RUN.values())) >= 20
