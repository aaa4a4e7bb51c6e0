"""The command lines without a checkout: `python -m contrastive pretrain …`, evaluate, extract, finetune."""

import sys

from contrastive import command

COMMANDS = {
    "pretrain": command.pretrain,
    "evaluate": command.evaluate,
    "extract": command.extract,
    "finetune": command.finetune,
}

if __name__ == "__main__":
    name, *words = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        sys.stderr.write(f"usage: python -m contrastive {{{','.join(COMMANDS)}}} [words]; each has --help\n")
        sys.exit(0 if name in command.HELP else command.WRONG_USE)
    sys.exit(COMMANDS[name](words))
