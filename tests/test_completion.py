"""Completion scripts, as shells run them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manyviews import cli, recipe
from manyviews.config.completion import SHELLS, completion_script

COMMANDS = {"pretrain": ["simclr", "moco", "train.epochs=", "train.batch_size="], "evaluate": ["tasks="]}
BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last}
_shtab_manyviews
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "source {folder}/start"
zpty -r shell line '*ready*'
zpty -w shell $'manyviews {typed}\\t'
zpty -r shell line '*ran:*;*'
print -r -- $line
"""
START = """
autoload -Uz compinit
compinit -u
eval "$(cat {folder}/zsh)"
manyviews() {{ print "ran: $*;" }}
print ready
"""
ASKED = {
    "pret": ["pretrain"],
    "pretrain si": ["simclr"],
    "pretrain simclr train.": ["train.epochs=", "train.batch_size="],
    "pretrain simclr train.epochs=3 train.b": ["train.batch_size="],
    "evaluate runs/mine ta": ["tasks="],
    "evaluate si": [],
}


def script(folder: Path, shell: str) -> Path:
    (folder / shell).write_text(completion_script(shell, COMMANDS))
    return folder / shell


@pytest.mark.parametrize(("typed", "offered"), ASKED.items())
def test_bash_completes_commands_recipes_and_keys(tmp_path: Path, typed: str, offered: list[str]) -> None:
    words = f"manyviews {typed}".replace("=", " = ").split()
    code = BASH.format(script=script(tmp_path, "bash"), words=" ".join(words), last=len(words) - 1)
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == offered
    assert not ran.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
@pytest.mark.parametrize(("typed", "offered"), ASKED.items())
def test_fish_completes_commands_recipes_and_keys(tmp_path: Path, typed: str, offered: list[str]) -> None:
    code = f"source {script(tmp_path, 'fish')}; complete -C 'manyviews {typed}'"
    ran = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
    assert {line.split("\t")[0] for line in ran.stdout.splitlines()} == set(offered)


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
@pytest.mark.parametrize("typed", [typed for typed, offered in ASKED.items() if len(offered) == 1])
def test_zsh_completes_commands_recipes_and_keys(tmp_path: Path, typed: str) -> None:
    (offered,) = ASKED[typed]
    (tmp_path / "start").write_text(START.format(folder=script(tmp_path, "zsh").parent))
    code = ZSH.format(folder=tmp_path, typed=typed)
    ran = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    # The word is whole, and no space follows it.
    assert f"ran: {' '.join([*typed.split()[:-1], offered])};" in ran.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_a_script_with_each_recipe_and_key(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.completion([shell]) == 0
    printed = capsys.readouterr().out
    for word in (*recipe.names(), "train.epochs=", "protocol.knn.neighbours=", "layers=", "layer_decay="):
        assert word in printed


def test_another_shell_and_another_command_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, answer in (
        (["completion", "tcsh"], "tcsh is none of bash, zsh, fish"),
        (["completion"], "no shell is none of bash, zsh, fish"),
        (["pretrian"], "pretrian is no command; did you mean pretrain?"),
        (["--epochs", "3"], "--epochs is no command"),
    ):
        monkeypatch.setattr(sys, "argv", ["manyviews", *words])
        assert cli.main() == cli.WRONG_USE
        assert answer in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["manyviews"])
    assert cli.main() == 0
    assert "usage: manyviews {pretrain,evaluate,verify,extract,finetune,completion}" in capsys.readouterr().out
