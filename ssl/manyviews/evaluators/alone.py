"""Tasks that may fail alone: what the others measure is kept, and a sentence says which one failed and why."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from manyviews.system.distributed import raise_on_all_ranks

Failed = Callable[[str, str, Exception], object]
"""Called with a task, the kind of features, and what it raised."""


@dataclass(frozen=True)
class Failure:
    """A task that could not be measured on one kind of features."""

    task: str
    features: str
    reason: str


@contextmanager
def alone(task: str, kind: str, failed: Failed | None) -> Iterator[None]:
    """A stretch of work that succeeds on all processes or fails on all, of which `failed` then hears; collective.

    Without `failed` what it raises is raised, as it is.
    """
    if failed is None:
        yield
        return
    try:
        with raise_on_all_ranks():
            yield
    except Exception as problem:
        failed(task, kind, problem)


def sentences(failures: Sequence[Failure], kinds: Sequence[str]) -> list[str]:
    """What to say of the failures: one sentence for each task and reason, with the kinds where not all have failed."""
    groups: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        groups.setdefault((failure.task, failure.reason), []).append(failure.features)
    return [
        f"{task} could not be measured{'' if set(kinds) <= set(own) else f' of {_joined(own)} features'}: {reason}"
        for (task, reason), own in groups.items()
    ]


def _joined(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
