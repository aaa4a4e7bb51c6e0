"""The command lines behind `scripts/`: words are parsed, work is called, errors are said in one sentence."""

import difflib
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from manyviews import recipe as recipes
from manyviews.config import Need, Settings, field_at, keys, load
from manyviews.config.completion import SHELLS
from manyviews.config.completion import completion as complete
from manyviews.evaluate import EvaluateSettings, check_measured
from manyviews.evaluate import evaluate as evaluate_run
from manyviews.evaluate.compare_runs import compare_runs
from manyviews.features.extract import ExtractSettings
from manyviews.features.extract import extract as extract_features
from manyviews.recipe import Recipe
from manyviews.run.folder import CONFIG
from manyviews.system import distributed, terminal
from manyviews.system.disk import in_words
from manyviews.system.files import spelled
from manyviews.system.launch import Interrupted, Stop, in_a_line, lost_process
from manyviews.system.memory import ran_out
from manyviews.system.versions import versions
from manyviews.train.finetune import FinetuneSettings
from manyviews.train.finetune import finetune as finetune_model
from manyviews.train.finetune import folder_of as finetuned_folder
from manyviews.train.preflight import check as check_recipe
from manyviews.train.pretrain import pretrain as run_recipe

HELP = {"-h", "--help", "help"}
CHECK = "--check"
WRONG_USE = 2
LOST_PROCESS = 3
KEY = re.compile(r"[A-Za-z_][\w.]*|")
"""What a key of a setting may look like; a word that begins with = has lost its key."""
MODEL = "a run folder or a timm model comes first, for example runs/quickstart or resnet18"
AGAIN, RESUME = "the same words go on from there", "the same words with resume=true go on from there"


def pretrain(words: Sequence[str]) -> int:
    """`pretrain.py [RECIPE] [--check] [key=value …]`."""
    usage = "pretrain.py [RECIPE] [--check] [key=value …]"
    about = (
        f"RECIPE is one of {', '.join(recipes.names())}, or a path; without one it is {recipes.QUICKSTART}. --check "
        "verifies recipe, images, memory and disk by two steps and a checkpoint, tells how long the run will take, and "
        "leaves nothing behind."
    )
    checks, words = CHECK in words, [word for word in words if word != CHECK]

    def run() -> None:
        given = list(words) if words and not is_setting(words[0], Recipe) else ["", *words]
        name, rest = given[0] or recipes.QUICKSTART, given[1:]
        file = recipes.find(name)
        recipe = load(Recipe, file, rest)
        if recipe.output is None:
            rest.append(f"output=runs/{file.stem}")
        begun = Path(str(load(Recipe, file, rest).output)).expanduser() / CONFIG
        # resume=true and a folder are enough: what it was begun with stands there.
        if recipe.resume and not given[0] and begun.is_file():
            file = begun
        if checks:
            check_recipe(load(Recipe, file, rest))
            return
        run_recipe(load(Recipe, file, rest), header=header(f"pretrain.py {shlex.join([name, *rest])}"))

    return _answer(usage, about, Recipe, words, run, goes_on=RESUME)


def evaluate(words: Sequence[str]) -> int:
    """`evaluate.py RUN [RUN …] [key=value …]`."""
    usage = "evaluate.py RUN [RUN …] [key=value …]"
    about = (
        "RUN is a run folder; what is measured is also kept in RUN/evaluation.json, beside what was measured before. "
        "Several are compared: seeds of one method are taken together, and methods have their differences from the "
        "first with intervals."
    )

    def run() -> None:
        first_of(words, EvaluateSettings, "a run folder comes first, for example runs/quickstart")
        given = list(takewhile(lambda word: not is_setting(word, EvaluateSettings), words))
        folder, *others = [Path(word).expanduser() for word in given]
        rest = words[len(given) :]
        settings = load(EvaluateSettings, None, rest, base=own_data(folder, rest))
        if others:
            compare_runs([folder, *others], settings)
        elif settings.comparison is not None:
            raise ValueError(f"comparison={settings.comparison} is for several runs, and there is one; name another")
        else:
            check_measured(evaluate_run(folder, settings), settings)

    return _answer(usage, about, EvaluateSettings, words, run, goes_on=AGAIN)


def extract(words: Sequence[str]) -> int:
    """`extract.py RUN|TIMM data=… output=… [key=value …]`."""
    usage = "extract.py RUN|TIMM data=/some/folder output=/some/features [key=value …]"
    about = (
        "RUN is a run folder, TIMM the name of a timm model (with pretrained=true or pretrained=false) or "
        "local-dir:FOLDER. Writes LAYER.npy for each layer (backbone.npy), labels.npy where there are labels, and "
        "manifest.json with the name of each row's image. The same words go on where they were interrupted."
    )

    def run() -> None:
        given = first_of(words, ExtractSettings, MODEL)
        extract_features(given, load(ExtractSettings, None, words[1:], base=own_data(Path(given), words[1:])))

    return _answer(usage, about, ExtractSettings, words, run, goes_on=AGAIN)


def finetune(words: Sequence[str]) -> int:
    """`finetune.py RUN|TIMM [data=…] [key=value …]`."""
    usage = "finetune.py RUN|TIMM data=/some/folder [key=value …]"
    about = (
        "RUN is a run folder, TIMM the name of a timm model (with pretrained=true or pretrained=false). Writes a "
        "classifier in timm's format, result.json, confusion.png and mistakes.png to runs/NAME-finetuned."
    )

    def run() -> None:
        given, rest = first_of(words, FinetuneSettings, MODEL), words[1:]
        settings = load(FinetuneSettings, None, rest, base=own_data(Path(given), rest))
        begun = finetuned_folder(given, settings) / CONFIG
        # resume=true is enough: what it was begun with stands in the folder.
        if settings.resume and begun.is_file():
            settings = load(FinetuneSettings, begun, rest)
        finetune_model(given, settings, header=header(f"finetune.py {shlex.join(words)}"))

    return _answer(usage, about, FinetuneSettings, words, run, goes_on=RESUME)


def header(command: str) -> str:
    """Comment lines that say how a run came to be: the command, the commit, the machine and the versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a checkout"
    packages = " ".join(f"{name} {version}" for name, version in versions().items())
    python = f"Python {platform.python_version()}; {platform.platform()}"
    return f"# {spelled(command)}\n# commit {commit}; {packages}; {python}\n"


def help_text(usage: str, about: str, model: type[Settings]) -> str:
    """Every key with its type, default and one line."""
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, 110), ""]
    above: tuple[Need, ...] = ()
    for entry in keys(model):
        for depth, need in enumerate(entry.needs):
            if need not in above[: depth + 1]:
                choice = f"with {need.field}={' | '.join(need.names)}: {need.about}".rstrip(": ")
                lines += textwrap.wrap(
                    choice, 110, initial_indent="  " * (depth + 1), subsequent_indent="  " * (depth + 2)
                )
        above = entry.needs
        indent = "  " * (len(above) + 1)
        lines.append(f"{indent}{entry.key:<28} {entry.kind}, default {entry.default}")
        lines += textwrap.wrap(entry.doc, 100, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")
    return "\n".join(lines)


def is_setting(word: str, model: type[Settings]) -> bool:
    """Whether a word of a command line is `key=value`, and not a path or a model's name that has a `=` in it.

    A key of the model always is a setting: ./seed=1 names a folder of that name. Of other words a path that exists is a
    path, and so is what no key can look like: runs/lr=0.1.
    """
    key, equals, _ = word.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not KEY.fullmatch(key):
        return False
    return field_at(model, key.split(".")) is not None or not Path(word).expanduser().exists()


def own_data(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The images of a run, where words change a part of them, as data.test=FOLDER does; nothing otherwise."""
    given = {word.partition("=")[0].strip().lstrip("-") for word in words}
    config = folder.expanduser() / CONFIG
    if {"data", "data.name"} & given or not any(key.startswith("data.") for key in given) or not config.is_file():
        return {}
    return {"data": load(Recipe, config).data.model_dump(mode="json")}


def first_of(words: Sequence[str], model: type[Settings], what: str) -> str:
    """The first word, where it is no setting.

    Raises:
        ValueError: saying what comes first.
    """
    if words and not is_setting(words[0], model):
        return words[0]
    folder = words and Path(words[0]).expanduser().exists()
    raise ValueError(f"{what}" + (f"; ./{words[0]} names the folder and not the setting" if folder else ""))


def _answer(
    usage: str, about: str, model: type[Settings], words: Sequence[str], run: Callable[[], object], *, goes_on: str
) -> int:
    """Runs a command and says in a sentence what went wrong; `goes_on` tells how to go on after a signal."""
    if HELP & set(words):
        terminal.write(help_text(usage, about, model) + "\n")
        return 0
    try:
        with Stop(at_once=True):
            run()
    except (ValueError, OSError) as problem:
        text = in_words(problem) if isinstance(problem, OSError) else str(problem)
        _say("".join(f"error: {line}\n" for line in text.splitlines()))
        return WRONG_USE
    except Interrupted as asked:
        if int(os.environ.get("RANK", "0")) == 0:
            _say(f"stopped by {asked.signal.name}: what had been saved stays, and {goes_on}\n")
        return 128 + asked.signal
    except (RuntimeError, MemoryError) as problem:
        if ran_out(problem):
            _say(
                f"error: there is too little memory ({in_a_line(problem)}); use a smaller batch_size or size, a part "
                "of the batch at a time (train.chunk), or a smaller model\n"
            )
            return WRONG_USE
        if "can't start new thread" in str(problem):
            _say(
                "error: the system starts no more threads (ulimit -u, or the container's limit of processes); raise "
                "the limit, or use fewer workers and threads\n"
            )
            return WRONG_USE
        if not lost_process(problem):
            raise
        reason = str(problem).strip().partition("\n")[0]
        _say(
            f"error: process {distributed.rank()} ends, for another process has died or does not answer ({reason}); "
            f"what had been saved stays, and {goes_on}\n"
        )
        # Not by the way of others: the threads of a process group may wait for the one that is lost.
        os._exit(LOST_PROCESS)
    return 0


def _say(text: str) -> None:
    sys.stdout.flush()
    terminal.write(text, error=True)


COMMANDS = {"pretrain": pretrain, "evaluate": evaluate, "extract": extract, "finetune": finetune}


def completion(words: Sequence[str]) -> int:
    """`manyviews completion bash|zsh|fish`: a script that completes commands, recipes and keys."""
    if HELP & set(words):
        terminal.write(
            f'usage: manyviews completion {"|".join(SHELLS)}; for example eval "$(manyviews completion bash)"\n'
        )
        return 0
    models: dict[str, type[Settings]] = {
        "pretrain": Recipe,
        "evaluate": EvaluateSettings,
        "extract": ExtractSettings,
        "finetune": FinetuneSettings,
    }
    choices = {name: [f"{entry.key}=" for entry in keys(model)] for name, model in models.items()}
    choices["pretrain"] = [*recipes.names(), CHECK, *choices["pretrain"]]
    try:
        terminal.write(complete(" ".join(words), "manyviews", {**choices, "completion": SHELLS}))
    except ValueError as problem:
        _say(f"error: {problem}\n")
        return WRONG_USE
    return 0


def main() -> int:
    """`manyviews COMMAND …`: the console command, and `python -m manyviews`."""
    commands = {**COMMANDS, "completion": completion}
    name, *words = sys.argv[1:] or ["--help"]
    if name in commands:
        return commands[name](words)
    nearest = difflib.get_close_matches(name, commands, 1)
    usage = f"usage: manyviews {{{','.join(commands)}}} …; each has --help\n"
    if name in HELP:
        terminal.write(usage)
        return 0
    _say(f"error: {name} is no command{f'; did you mean {nearest[0]}?' if nearest else ''}\n{usage}")
    return WRONG_USE
