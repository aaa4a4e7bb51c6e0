"""Shell completion for commands that take names and `key=value`."""

import argparse
from collections.abc import Mapping, Sequence

import shtab

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, program: str, commands: Mapping[str, Sequence[str]]) -> str:
    """Return the completion script of a program for a shell.

    The script is static: it holds every word, so that completing one does not start Python.

    Args:
        shell: one of `SHELLS`.
        program: the name of the console command.
        commands: each subcommand with what may follow it; a key ends in `=`.

    Raises:
        ValueError: for another shell.

    Example:
        >>> "simclr" in completion("bash", "manyviews", {"pretrain": ["simclr", "train.epochs="]})
        True
    """
    if shell not in SHELLS:
        raise ValueError(f"{shell or 'no shell'} is none of {', '.join(SHELLS)}")
    parser = argparse.ArgumentParser(program, add_help=False)
    subparsers = parser.add_subparsers()
    for name, choices in commands.items():
        subparser = subparsers.add_parser(name, add_help=False, help=name)
        words = subparser.add_argument("words", nargs=argparse.REMAINDER, choices=choices)
        if shell == "zsh":  # which would put a space between a key and its value
            vars(words)["complete"] = {"zsh": f"{{compadd -S '' -- {' '.join(choices)}}}"}
    script: str = shtab.complete(parser, shell)
    # As bash would.
    return script.replace("complete -o bashdefault", "complete -o nospace -o bashdefault")
