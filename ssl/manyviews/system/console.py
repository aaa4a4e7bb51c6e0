"""Console output: text for any encoding without control characters, and progress bars."""

import codecs
import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.console import ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment

from manyviews.system.files import spelled

SECONDS_BETWEEN_LINES = 10.0
ERRORS = "manyviews_spelled"
"""The name of our codecs error handler."""

_REPLACED = """
× x   → ->   ← <-   ⇝ ~>   … ...   ± +-   ≤ <=   ≥ >=   ≠ !=   ‖ ||   ² ^2   ³ ^3   ½ 1/2   ∝ ~   · *   • *   ◌ o
α alpha   β beta   γ gamma   ε epsilon   θ theta   λ lambda   μ mu   µ mu   ν nu   π pi   σ sigma   τ tau   φ phi
ψ psi   Σ sum   Δ delta   ✓ yes   ✗ no   “ "   ” "   ‘ '   ’ '
"""
INSTEAD = {
    **dict(re.findall(r"(\S+) (\S+)", _REPLACED)),
    "√": "sqrt ",
    **dict.fromkeys("–—−─━╌╍┄┅═╴╶╸╺", "-"),
    **dict.fromkeys("│┃┆┇║╎╏", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┣┫┳┻╋╔╗╚╝╠╣╦╩╬┡┩╇╈╉╊╞╡╪", "+"),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
}
"""ASCII for a character of our own messages; any other character is escaped."""


def prepare() -> None:
    """Lets standard output and error replace characters outside their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != ERRORS:
            stream.reconfigure(errors=ERRORS)


def clean(text: str) -> str:
    """Escapes all control characters but line breaks and tabs."""
    return "\n".join("\t".join(map(spelled, line.split("\t"))) for line in text.split("\n"))


def write(text: str, *, error: bool = False) -> None:
    """Writes and flushes text to standard output or error, without control characters."""
    prepare()
    stream = sys.stderr if error else sys.stdout
    stream.write(clean(text))
    stream.flush()


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    text = "".join(INSTEAD.get(letter) or spelled(letter, ascii_only=True) for letter in letters)
    return text, error.end


codecs.register_error(ERRORS, _instead)


class Console:
    """Lines, warnings and progress bars; silent with `quiet`, as on all ranks but 0."""

    def __init__(self, *, quiet: bool = False) -> None:
        prepare()
        self.rich = rich.console.Console(quiet=quiet, highlight=False)
        self.rich.push_render_hook(_Cleaning())
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line."""
        self.rich.print(clean(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.rich.print(f"warning: {clean(text)}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """On a terminal, shows `update` and `report` as bars while the context is open."""
        if not self.rich.is_terminal or self.rich.quiet:
            yield
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[status]}", markup=False),
        )
        with Progress(*columns, console=self.rich, transient=True) as self._bars:
            try:
                yield
            finally:
                self._bars, self._tasks = None, {}

    def update(self, what: str, progress: float, status: str = "") -> None:
        """Moves a bar to `progress` in [0, 1]; without a terminal, prints a line every few seconds."""
        status = clean(status)
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(clean(what), total=1.0, status=status)
            self._bars.update(self._tasks[what], completed=progress, status=status)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{what} {100 * progress:3.0f}%  {status}")

    def report(self, what: str, done: int, total: int) -> None:
        """Shows the progress of reading `total` items."""
        self.update(what, done / max(total, 1), f"{done:,} of {total:,}")


class _Cleaning(RenderHook):
    """Escapes control characters in all output; rich drops only some of them."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Clean(renderable) for renderable in renderables]


class _Clean:
    """A renderable without control characters but rich's own."""

    def __init__(self, printed: RenderableType) -> None:
        self.printed = printed

    def __rich_console__(self, console: rich.console.Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.printed, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


def duration(seconds: float) -> str:
    """Formats seconds as s, min or h.

    Examples:
        >>> duration(185.0)
        '3 min 05 s'
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
