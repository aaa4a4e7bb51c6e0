"""What a person sees while it runs: a bar on a terminal, a line now and then anywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.console import ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment

from manyviews.system import terminal

SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Console output: lines, warnings and progress bars; silent with `quiet`, as on all ranks but the first."""

    def __init__(self, *, quiet: bool = False) -> None:
        terminal.prepare()
        self.rich = rich.console.Console(quiet=quiet, highlight=False)
        self.rich.push_render_hook(_Cleaning())
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        self.rich.print(terminal.clean(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that should not be overlooked."""
        self.rich.print(f"warning: {terminal.clean(text)}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Shows what `update` and `report` say as bars while the context is open, if this is a terminal."""
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
        """Moves a bar to `progress` in [0, 1]; without a terminal, prints a line when some time has passed."""
        status = terminal.clean(status)
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(terminal.clean(what), total=1.0, status=status)
            self._bars.update(self._tasks[what], completed=progress, status=status)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{what} {100 * progress:3.0f}%  {status}")

    def report(self, what: str, done: int, total: int) -> None:
        """How far a long reading has come."""
        self.update(what, done / max(total, 1), f"{done:,} of {total:,}")


class _Cleaning(RenderHook):
    """Cleans all that is printed: cells of tables hold names of runs, and of their controls rich drops only some."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Clean(renderable) for renderable in renderables]


class _Clean:
    """Something that rich prints, without control characters but those that rich itself puts there."""

    def __init__(self, printed: RenderableType) -> None:
        self.printed = printed

    def __rich_console__(self, console: rich.console.Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.printed, options):
            yield segment if segment.control else Segment(terminal.clean(segment.text), segment.style)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 45 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
