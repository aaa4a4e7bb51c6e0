"""Command lines: parse arguments, call the work, report an error in one sentence."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from manyviews import recipe as recipes
from manyviews.config import Settings, field_at, help_text, keys, load
from manyviews.config.completion import SHELLS, completion_script
from manyviews.evaluation import EvaluateSettings, check_measured
from manyviews.evaluation import evaluate as evaluate_run
from manyviews.evaluation.compare_runs import compare_runs
from manyviews.evaluation.verify import VerifySettings, verify_images
from manyviews.features.extract import ExtractSettings
from manyviews.features.extract import extract as extract_features
from manyviews.recipe import Recipe
from manyviews.run.folder import CONFIG
from manyviews.system import console, distributed
from manyviews.system.disk import in_words
from manyviews.system.files import spelled
from manyviews.system.hardware import ran_out, short_of_memory
from manyviews.system.launch import Interrupted, Stop, lost_process
from manyviews.system.names import did_you_mean
from manyviews.system.versions import versions
from manyviews.train.finetune import FinetuneSettings
from manyviews.train.finetune import finetune as finetune_model
from manyviews.train.finetune import folder_of as finetuned_folder
from manyviews.train.preflight import check as check_recipe
from manyviews.train.pretrain import pretrain as pretrain_recipe
from manyviews.train.session import OnMetrics

HELP = {"-h", "--help", "help"}
CHECK = "--check"
WRONG_USE = 2
LOST_PROCESS = 3
KEY = re.compile(r"[A-Za-z_][\w.]*|")
"""What a key of a setting may look like; a word that begins with = has lost its key."""
MODEL = "a run folder or a timm model comes first, for example runs/quickstart or resnet18"
AGAIN = "re-run the same command to continue"
RESUME = "re-run the same command with resume=true to continue"


class Command(NamedTuple):
    """A subcommand; calling it with the arguments returns the exit status."""

    usage: str
    about: str
    settings: type[Settings]
    run: Callable[[Sequence[str]], object]
    resume: str = AGAIN
    """How to continue after a signal."""

    def __call__(self, args: Sequence[str]) -> int:
        """Runs the command; prints what went wrong in a sentence."""
        if HELP & set(args):
            console.write(help_text(self.usage, self.about, self.settings) + "\n")
            return 0
        try:
            with Stop(at_once=True):
                self.run(args)
        except Interrupted as stop:
            if int(os.environ.get("RANK", "0")) == 0:
                _print_error(f"stopped by {stop.signal.name}: what had been saved stays; {self.resume}\n")
            return 128 + stop.signal
        except (ValueError, OSError, RuntimeError, MemoryError) as problem:
            if isinstance(problem, OSError):
                text = in_words(problem)
            elif isinstance(problem, ValueError):
                text = str(problem)
            elif ran_out(problem):
                text = (
                    f"{short_of_memory(problem)}; use a smaller batch_size or size, a part of the batch at a time "
                    "(train.chunk), or a smaller model"
                )
            elif "can't start new thread" in str(problem):
                text = (
                    "the system starts no more threads (ulimit -u, or the container's limit of processes); raise the "
                    "limit, or use fewer workers and threads"
                )
            elif lost_process(problem):
                reason = str(problem).strip().partition("\n")[0]
                _print_error(
                    f"error: rank {distributed.rank()} exits because another rank has died or does not respond "
                    f"({reason}); what had been saved stays; {self.resume}\n"
                )
                # Threads of the process group may wait for the lost rank: a regular exit could hang.
                os._exit(LOST_PROCESS)
            else:
                raise
            _print_error("".join(f"error: {line}\n" for line in text.splitlines()))
            return WRONG_USE
        return 0


def header(command: str) -> str:
    """Comment lines with the provenance of a run: command, commit, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a checkout"
    packages = " ".join(f"{name} {version}" for name, version in versions().items())
    python = f"Python {platform.python_version()}; {platform.platform()}"
    return f"# {spelled(command)}\n# commit {commit}; {packages}; {python}\n"


def is_setting(arg: str, model: type[Settings]) -> bool:
    """Whether an argument is `key=value`, and not a path or a model's name with a `=` in it.

    A key of the settings always is one (./seed=1 names the folder). Anything else is a path if that exists, or if no
    key can look like it: runs/lr=0.1.
    """
    key, equals, _ = arg.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not KEY.fullmatch(key):
        return False
    return field_at(model, key.split(".")) is not None or not Path(arg).expanduser().exists()


def own_data(folder: Path, args: Sequence[str]) -> dict[str, Any]:
    """The `data` settings of a run, if arguments change a part of them (data.test=FOLDER)."""
    changed = {arg.partition("=")[0].strip().lstrip("-") for arg in args}
    config = folder.expanduser() / CONFIG
    if {"data", "data.name"} & changed or not any(key.startswith("data.") for key in changed) or not config.is_file():
        return {}
    return {"data": load(Recipe, config).data.model_dump(mode="json")}


def first_of(args: Sequence[str], model: type[Settings], what: str) -> str:
    """Returns the first argument; raises ValueError with `what` for a setting or none."""
    if args and not is_setting(args[0], model):
        return args[0]
    folder = args and Path(args[0]).expanduser().exists()
    raise ValueError(f"{what}" + (f"; ./{args[0]} names the folder and not the setting" if folder else ""))


def run_pretrain(args: Sequence[str], *, on_metrics: OnMetrics | None = None) -> Path:
    """Pretrains as `manyviews pretrain` does; returns the run folder."""
    check, args = CHECK in args, [arg for arg in args if arg != CHECK]
    named = bool(args) and not is_setting(args[0], Recipe)
    name, overrides = args[0] if named else "", list(args[named:])
    file = recipes.find(name or recipes.QUICKSTART)
    recipe = load(Recipe, file, overrides)
    if recipe.output is None:
        overrides.append(f"output=runs/{file.stem}")
        recipe = load(Recipe, file, overrides)
    config = Path(str(recipe.output)).expanduser() / CONFIG
    # resume=true and a folder are enough: the folder has the settings of the first start.
    if recipe.resume and not name and config.is_file():
        recipe = load(Recipe, config, overrides)
    if check:
        check_recipe(recipe)
        return Path(str(recipe.output))
    command = shlex.join([name or recipes.QUICKSTART, *overrides])
    return pretrain_recipe(recipe, header=header(f"manyviews pretrain {command}"), on_metrics=on_metrics)


def run_evaluate(args: Sequence[str]) -> None:
    """Evaluates a run, or compares several, as `manyviews evaluate` does."""
    first_of(args, EvaluateSettings, "a run folder comes first, for example runs/quickstart")
    runs = list(takewhile(lambda arg: not is_setting(arg, EvaluateSettings), args))
    folder, *others = [Path(run).expanduser() for run in runs]
    overrides = args[len(runs) :]
    settings = load(EvaluateSettings, None, overrides, base=own_data(folder, overrides))
    if others:
        compare_runs([folder, *others], settings)
    elif settings.comparison is not None:
        raise ValueError(f"comparison={settings.comparison} is for several runs, and there is one; name another")
    else:
        check_measured(evaluate_run(folder, settings), settings)


def run_verify(args: Sequence[str]) -> None:
    """Compares two images as `manyviews verify` does."""
    paths = list(takewhile(lambda arg: not is_setting(arg, VerifySettings), args))
    if len(paths) != 3:
        raise ValueError("a run folder and two images come first, for example runs/quickstart a.jpg b.jpg")
    folder, first, second = paths
    verdict = verify_images(Path(folder).expanduser(), first, second, load(VerifySettings, None, args[3:]))
    console.write(f"{verdict}\n")
    if verdict.missing:
        _print_error(f"warning: {verdict.missing}\n")


def run_extract(args: Sequence[str]) -> Path:
    """Extracts features as `manyviews extract` does; returns their folder."""
    model, overrides = first_of(args, ExtractSettings, MODEL), args[1:]
    return extract_features(model, load(ExtractSettings, None, overrides, base=own_data(Path(model), overrides)))


def run_finetune(args: Sequence[str], *, on_metrics: OnMetrics | None = None) -> Path:
    """Fine-tunes as `manyviews finetune` does; returns the folder of the classifier."""
    model, overrides = first_of(args, FinetuneSettings, MODEL), args[1:]
    settings = load(FinetuneSettings, None, overrides, base=own_data(Path(model), overrides))
    config = finetuned_folder(model, settings) / CONFIG
    # resume=true is enough: the folder has the settings of the first start.
    if settings.resume and config.is_file():
        settings = load(FinetuneSettings, config, overrides)
    command = header(f"manyviews finetune {shlex.join(args)}")
    return finetune_model(model, settings, header=command, on_metrics=on_metrics)


def _completion(args: Sequence[str]) -> None:
    choices = {name: [f"{entry.key}=" for entry in keys(command.settings)] for name, command in COMMANDS.items()}
    choices["pretrain"] = [*recipes.names(), CHECK, *choices["pretrain"]]
    choices["completion"] = [*SHELLS]
    console.write(completion_script(" ".join(args), choices))


def _print_error(text: str) -> None:
    sys.stdout.flush()
    console.write(text, error=True)


pretrain = Command(
    "manyviews pretrain [RECIPE] [--check] [key=value …]",
    f"RECIPE is one of {', '.join(recipes.names())}, or a path; without one it is {recipes.QUICKSTART}. --check "
    "verifies recipe, images, memory and disk by two steps and a checkpoint, tells how long the run will take, and "
    "leaves nothing behind.",
    Recipe,
    run_pretrain,
    RESUME,
)
evaluate = Command(
    "manyviews evaluate RUN [RUN …] [key=value …]",
    "RUN is a run folder; what is measured is also kept in RUN/evaluation.json, beside what was measured before. "
    "Several are compared: seeds of one method are grouped, and methods have their differences from the first "
    "with intervals.",
    EvaluateSettings,
    run_evaluate,
)
verify = Command(
    "manyviews verify RUN IMAGE IMAGE [key=value …]",
    "RUN is a run folder. Prints the cosine or distance of two images, and whether they are of one class by the "
    "threshold of the run's verification (manyviews evaluate RUN tasks=verification).",
    VerifySettings,
    run_verify,
)
extract = Command(
    "manyviews extract RUN|TIMM data=/some/folder output=/some/features [key=value …]",
    "RUN is a run folder, TIMM the name of a timm model (with pretrained=true or pretrained=false) or "
    "local-dir:FOLDER. Writes LAYER.npy for each layer (backbone.npy), labels.npy where there are labels, and "
    "manifest.json with the name of each row's image. The same command continues where it was interrupted.",
    ExtractSettings,
    run_extract,
)
finetune = Command(
    "manyviews finetune RUN|TIMM data=/some/folder [key=value …]",
    "RUN is a run folder, TIMM the name of a timm model (with pretrained=true or pretrained=false). Writes a "
    "classifier in timm's format, result.json, confusion.png and mistakes.png to runs/NAME-finetuned.",
    FinetuneSettings,
    run_finetune,
    RESUME,
)
completion = Command(
    f"manyviews completion {'|'.join(SHELLS)}",
    'Prints a script that completes commands, recipes and keys; for example eval "$(manyviews completion bash)".',
    Settings,
    _completion,
)
COMMANDS = {"pretrain": pretrain, "evaluate": evaluate, "verify": verify, "extract": extract, "finetune": finetune}


def main() -> int:
    """`manyviews COMMAND …`: the console command, and `python -m manyviews`."""
    commands = {**COMMANDS, "completion": completion}
    name, *args = sys.argv[1:] or ["--help"]
    if name in commands:
        return commands[name](args)
    usage = f"usage: manyviews {{{','.join(commands)}}} …; each has --help\n"
    if name in HELP:
        console.write(usage)
        return 0
    _print_error(f"error: {name} is no command{did_you_mean(name, commands)}\n{usage}")
    return WRONG_USE
