"""Failures of single tasks, while the others are measured, and their messages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from manyviews.system.distributed import raise_on_all_ranks

OnFailure = Callable[[str, str, Exception], object]
"""Called with the task, the kind of features and the exception."""


@dataclass(frozen=True)
class Failure:
    """A task that could not be measured on one kind of features."""

    task: str
    features: str
    reason: str


@contextmanager
def catch_failure(task: str, kind: str, on_failure: OnFailure | None) -> Iterator[None]:
    """Context manager: an exception on any rank goes to `on_failure` on all; collective.

    Without `on_failure`, exceptions pass through.
    """
    if on_failure is None:
        yield
        return
    try:
        with raise_on_all_ranks():
            yield
    except Exception as problem:
        on_failure(task, kind, problem)


def failure_messages(failures: Sequence[Failure], kinds: Sequence[str]) -> list[str]:
    """Returns a sentence for each task and reason, with the kinds unless all of `kinds` failed."""
    groups: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        groups.setdefault((failure.task, failure.reason), []).append(failure.features)
    messages = []
    for (task, reason), failed in groups.items():
        names = failed[-1] if len(failed) == 1 else f"{', '.join(failed[:-1])} and {failed[-1]}"
        scope = "" if set(kinds) <= set(failed) else f" for {names} features"
        messages.append(f"{task} could not be measured{scope}: {reason}")
    return messages
