"""What the checkout looks like: where modules live, which way imports point, and that the README tells the truth."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from manyviews import cli, recipe
from manyviews.config import keys, load, vocabulary
from manyviews.evaluation import EvaluateSettings
from manyviews.evaluation.verify import VerifySettings
from manyviews.features.extract import ExtractSettings
from manyviews.objectives import Objective
from manyviews.recipe import Recipe
from manyviews.train.finetune import FinetuneSettings
from pages import commands

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl" / "manyviews"
README = (ROOT / "README.md").read_text()
LEVELS = [
    {"system"},
    {"config", "engine"},
    {"run", "data", "encoder", "objectives", "linear_metrics", "optim"},
    {"views"},
    {"recipe"},
    {"features"},
    {"evaluators"},
    {"report", "train"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def test_ssl_is_still_the_standard_library() -> None:
    code = "import ssl, asyncio, http.client; assert ssl.OPENSSL_VERSION"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_only_the_package_lives_in_ssl() -> None:
    assert {path.name for path in (ROOT / "ssl").iterdir()} - {"__pycache__"} == {"manyviews"}


def test_the_package_is_fourteen_folders_and_three_files_none_of_them_long() -> None:
    names = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")} - {"py.typed"}
    assert names == set().union(*LEVELS) - {"optim", "recipe", "cli", "__main__"} | {"optim.py", "recipe.py", "cli.py"}
    assert len(names) == 17
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, f"{path.relative_to(PACKAGE)} has more than 300 lines"


def test_the_entry_calls_the_loop_and_the_loop_fits_on_a_screen() -> None:
    calls = ast.parse((PACKAGE / "cli.py").read_text())
    modules = {node.module for node in ast.walk(calls) if isinstance(node, ast.ImportFrom)}
    assert "manyviews.train.pretrain" in modules
    loop = ast.parse((PACKAGE / "train" / "pretrain.py").read_text())
    lines = {
        node.name: node.end_lineno - node.lineno + 1
        for node in loop.body
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    assert lines["train"] <= 40
    assert {"train_step", "gradient"} <= lines.keys()


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [
        f"manyviews.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "manyviews"
        for alias in node.names
    ]
    return {module.split(".")[1] for module in modules if module.startswith("manyviews.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if importer == "__init__":
        # The Python interface, above all.
        return
    for name in imported(path) - {importer}:
        assert LEVEL[name] < LEVEL[importer], f"{path.name} imports {name}"


def test_nothing_private_of_torch_or_timm_is_used() -> None:
    # What has a fallback is looked up by getattr.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if re.fullmatch(r"(torch|timm)(\.\w+)*\._[a-zA-Z][\w.]*", name)], path


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_loads_and_is_named_in_the_readme(name: str) -> None:
    file = recipe.find(name)
    assert load(Recipe, file).seed == 0
    assert file.read_text().startswith("#"), f"{file.name} has no header that says what it claims"
    assert f"`{name}`" in README


def test_every_objective_has_its_line_among_the_recipes_and_every_recipe_its_objective() -> None:
    table = (ROOT / "configs" / "README.md").read_text().split("<!-- objectives -->\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert all(len(row) == 5 and all(row) for row in rows)
    found = {row[0].strip("`"): [word.strip(" `") for word in row[3].split(",")] for row in rows}
    settings = get_args(get_args(Objective)[0])
    assert found.keys() == {member.model_fields["name"].default for member in settings}
    for objective, recipes in found.items():
        assert {load(Recipe, recipe.find(name)).objective.name for name in recipes} == {objective}
    assert sorted(name for recipes in found.values() for name in recipes) == recipe.names()


TERMS = (
    *("NT-Xent", "InfoNCE", "SupCon", "MoCo", "NNCLR", "CPC", "FaceNet", "batch-hard", "NormFace", "A-Softmax", "LMCL"),
    *("ArcFace", "RankNet", "ListNet", "ListMLE", "word2vec", "negative sampling"),
)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_field_is_in_the_help_and_in_the_docs(term: str) -> None:
    shown = " ".join(cli.help_text("", "", Recipe).split())
    assert term in shown
    assert term in (ROOT / "configs" / "README.md").read_text()


@pytest.mark.parametrize("term", sorted(vocabulary.OBJECTIVES))
def test_the_answer_to_a_methods_name_is_a_recipe_that_loads(term: str) -> None:
    words = re.findall(r"\b((?:objective(?:\.\w+)?|ids)=\w+)", vocabulary.OBJECTIVES[term])
    assert words[0].startswith("objective=")
    for word in words:
        # Of several answers each stands alone.
        choice = [] if word.startswith(("objective=", "ids=")) else [words[0]]
        load(Recipe, None, [*choice, word] if word != "ids=labels" else [words[0], word])
    for name in re.findall(r"as in recipes? (\w+)(?: and (\w+))?", vocabulary.OBJECTIVES[term]):
        assert {*name} - {""} <= {*recipe.names()}


@pytest.mark.parametrize(("term", "name"), sorted(vocabulary.RECIPES.items()))
def test_a_methods_name_is_answered_with_the_recipe_that_trains_by_it(term: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {name}\\?$"):
        recipe.find(term)


def test_each_key_of_other_libraries_is_answered_with_a_key_that_exists() -> None:
    known = [entry.key for model in (Recipe, FinetuneSettings, EvaluateSettings) for entry in keys(model)]
    for term, ends in vocabulary.KEYS.items():
        for end in ends:
            assert any(key in (end, f"{end}.name") or key.endswith(f".{end}") for key in known), f"{term}: {end}"


def test_every_path_in_the_readmes_tree_exists_and_every_room_is_in_it() -> None:
    tree = README.split("<!-- tree -->")[1].split("```text\n")[1].split("```")[0]
    parts: list[str] = []
    named: set[str] = set()
    for line in tree.splitlines():
        match = re.match(r"(\s*)(\S+)(?:\s{2,}.*)?$", line)
        if not match:
            continue
        depth = len(match[1]) // 2
        parts[depth:] = [match[2].rstrip("/")]
        path = "/".join(parts)
        assert (ROOT / path).exists(), f"README's tree names {path}"
        named.add(path)
    rooms = {path for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix in ("", ".py")}
    assert {str(path.relative_to(ROOT)) for path in rooms} <= named


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_recipes_and_the_sample_are_in_the_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "manyviews/configs"}
    assert (PACKAGE / "py.typed").exists()


def test_every_command_in_the_docs_names_scripts_and_keys_that_exist() -> None:
    models = {
        "pretrain": Recipe,
        "evaluate": EvaluateSettings,
        "verify": VerifySettings,
        "extract": ExtractSettings,
        "finetune": FinetuneSettings,
    }
    checked = 0
    for line in commands():
        spelled = line.startswith(tuple(f"python scripts/{name}.py" for name in models))
        assert not spelled, f"docs name the installed command: {line}"
        match = re.search(r"(?:scripts/|manyviews )(\w+)(?:\.py)?(.*)", line)
        if not match:
            continue
        assert match[1] in {*models, "benchmark", "gpu_check", "gpu_wheels"}, line
        if match[1] in models:
            # The tutorial's objective exists in its test only.
            if "objective=uniformity" in line:
                continue
            known = {entry.key for entry in keys(models[match[1]])} | {"data", "objective", "metric", "encoder.context"}
            assert {word.split("=")[0] for word in match[2].split() if "=" in word} <= known, line
            checked += 1
    assert checked >= 30


def test_every_launch_in_the_docs_is_one_that_its_launcher_understands() -> None:
    launchers = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}
    launched = Counter[str]()
    for line in commands():
        for launcher, parser in launchers.items():
            _, launch, args = line.partition(f"{launcher} ")
            if not launch:
                continue
            parsed = parser.parse_args(args.split())
            launched_scripts = {
                "scripts/pretrain.py",
                "scripts/evaluate.py",
                "scripts/extract.py",
                "manyviews",
                "my_script.py",
            }
            assert parsed.training_script in launched_scripts, line
            assert {word for word in parsed.training_script_args if word.startswith("-")} <= {cli.CHECK}, line
            launched[launcher] += 1
    assert launched["accelerate launch"] >= 4
    assert launched["torchrun"] >= 3


def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    # The build backend by itself, which is what pip calls.
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert {f"manyviews/configs/{name}.yaml" for name in recipe.names()} <= names
    assert {"manyviews/py.typed", "manyviews/data/sample/train.png", "manyviews/data/sample/LICENSE"} <= names
    assert {f"manyviews/report/{name}" for name in ("template.html", "style.css", "map.js")} <= names
    code = (
        "import manyviews, sys; from manyviews import recipe; from manyviews.data import Sample\n"
        f"assert manyviews.__file__.startswith({str(tmp_path)!r}), manyviews.__file__\n"
        "assert 'quickstart' in recipe.names() and recipe.folder().parent.name == 'manyviews'\n"
        "assert len(Sample().build().train) == 10_000\n"
        "from manyviews.cli import pretrain; sys.exit(pretrain(['--help']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_no_workplace_words_in_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml"} and path != Path(__file__):
            assert not re.search(r"/(?:work/|home/[a-z])", path.read_text()), f"{name} names a folder of one machine"
