"""What README and docs/ show: their commands, and their blocks of code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}


def blocks(language: str, path: Path | None = None) -> list[str]:
    """The blocks of one language, of one page or of all."""
    texts = PAGES.values() if path is None else [PAGES[path]]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(path: Path | None = None) -> list[str]:
    """The lines of the shell blocks, each whole and without its comment."""
    lines = [line for block in blocks("bash", path) for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0] for line in lines]
