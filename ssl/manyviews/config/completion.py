"""Completion scripts for shells."""

import argparse
from collections.abc import Mapping, Sequence

import shtab

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str, commands: Mapping[str, Sequence[str]]) -> str:
    """The completion script of `manyviews` for a shell.

    The script is static: it lists every argument of each subcommand, and completing one does not start Python.

    Raises:
        ValueError: for a shell that is not in `SHELLS`.
    """
    if shell not in SHELLS:
        raise ValueError(f"{shell or 'no shell'} is none of {', '.join(SHELLS)}")
    parser = argparse.ArgumentParser("manyviews", add_help=False)
    subparsers = parser.add_subparsers()
    for name, choices in commands.items():
        subparser = subparsers.add_parser(name, add_help=False, help=name)
        argument = subparser.add_argument("args", nargs=argparse.REMAINDER, choices=choices)
        if shell == "zsh":  # which would put a space between a key and its value
            vars(argument)["complete"] = {"zsh": f"{{compadd -S '' -- {' '.join(choices)}}}"}
    script: str = shtab.complete(parser, shell)
    # As bash would.
    return script.replace("complete -o bashdefault", "complete -o nospace -o bashdefault")
