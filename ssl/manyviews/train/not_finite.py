"""Steps that are skipped because a number is not finite: they leave no trace, and are told of in a report."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from manyviews.run.checkpoints import not_finite, way_on
from manyviews.run.folder import CHECKPOINTS
from manyviews.system import distributed
from manyviews.system.writing import write_json
from manyviews.train.step import buffers_of, restore_buffers

REPORT = "not_finite.json"
MOST_IN_A_ROW = 20
"""Skipped steps, one after the other, after which a run ends: it would not recover."""
MOST_NAMED = 64
"""Images, and tensors, that the report names for each process."""


class Skipped(NamedTuple):
    """What was not finite on this process in a step that moved nothing; empty where another process had to skip it."""

    step: int
    epoch: int
    loss: dict[str, float]
    """The loss and all its terms."""
    gradients: tuple[str, ...]
    """Of which parameters the gradient was not finite."""
    weights: tuple[str, ...]
    """Which parameters were not finite themselves."""
    ids: tuple[int, ...]
    """The images of the step."""
    views: tuple[bool, ...]
    """Whether the views of each image were finite."""
    embeddings: tuple[bool, ...]
    """Whether the embeddings of each image were finite."""

    @property
    def terms(self) -> list[str]:
        """The names of the loss and of those terms that were not finite."""
        return [name for name, value in self.loss.items() if not math.isfinite(value)]


class Guard:
    """Watches over one step: where its loss or a gradient is not finite on any rank, it is skipped without a trace."""

    def __init__(
        self, accelerator: Accelerator, optimiser: Any, modules: Mapping[str, nn.Module], *passed: nn.Module | None
    ) -> None:
        """Copies the buffers that passes in training move, of the modules `passed`; `modules` have gradients."""
        self._accelerator, self._optimiser, self._modules = accelerator, optimiser, modules
        self._buffers = buffers_of(*passed)

    def gradient_norm(self, loss: Tensor) -> Tensor | None:
        """The norm of the first module's gradient; None where the step must be skipped; collective."""
        # What fp16 has scaled; nothing otherwise.
        self._accelerator.unscale_gradients(self._optimiser)
        norms = [_norm(module, loss.device) for module in self._modules.values()]
        finite = torch.stack([number.isfinite() for number in (loss.detach(), *norms)])
        # All processes agree, and nothing else has moved yet: one that skipped alone would leave the others' path.
        return None if distributed.any_over_ranks(not bool(finite.all())) else norms[0]

    def skip(
        self,
        step: int,
        epoch: int,
        ids: Int64[Tensor, " batch"],
        views: Bool[Tensor, " batch"],
        embeddings: Bool[Tensor, " batch"],
        loss: Mapping[str, Tensor],
    ) -> Skipped:
        """Drops the step with its gradients, and returns what is known of it.

        `views` and `embeddings` tell of each image whether they are finite; `loss` holds the total and all terms.
        """
        modules = self._modules.items()
        parameters = {
            f"{owner}.{name}": value for owner, module in modules for name, value in module.named_parameters()
        }
        gradients = not_finite({name: value.grad for name, value in parameters.items()})
        numbers = {name: float(value) for name, value in loss.items()}
        images = (tuple(values.tolist()) for values in (ids, views, embeddings))
        restore_buffers(self._buffers)
        scaler = self._accelerator.scaler
        if scaler is not None:
            # As its own step would have done: in fp16 a scale that is too high is the usual reason.
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self._optimiser.zero_grad(set_to_none=True)
        return Skipped(step, epoch, numbers, tuple(gradients), tuple(not_finite(parameters)), *images)


class Skips:
    """Counts the steps that are skipped, warns of some, and ends a run in which they do not end."""

    def __init__(
        self, folder: Path, names: Sequence[str], warn: Callable[[str], None], *, cure: str, total: int = 0
    ) -> None:
        """Begins to count.

        Args:
            folder: the run's, for the report.
            names: those of all images, by id.
            warn: gets a sentence on the first, the tenth, the hundredth … step that was skipped.
            cure: what the advice is to try.
            total: the steps that were skipped before a resume.
        """
        self._folder, self._names, self._warn, self._cure = folder, names, warn, cure
        self.total, self._in_a_row = total, 0

    def count(self, found: Skipped | None) -> None:
        """Counts a step that was skipped, or with None one that was not; collective, and all processes raise.

        Raises:
            ValueError: after too many skipped steps in a row, naming the report.
        """
        if found is None:
            self._in_a_row = 0
            return
        self._in_a_row, self.total = self._in_a_row + 1, self.total + 1
        if str(self.total).strip("0") == "1":
            said = f"step {found.step + 1:,} was skipped: {in_words(found)} not finite"
            self._warn(f"{said}; {self.total:,} skipped so far")
        if self._in_a_row < MOST_IN_A_ROW:
            return
        said, report = in_words(found), _write_report(self._folder, found, self._in_a_row, self._names)
        seen = f"see {report}, which names the images" if report else "the report could not be written"
        raise ValueError(
            f"{self._in_a_row} steps in a row were skipped, up to step {found.step + 1:,}: {said} not finite; {seen}; "
            f"{way_on(self._folder / CHECKPOINTS)} with {self._cure}"
        )


def in_words(found: Skipped) -> str:
    """What was not finite on any process; the same on all of them, collective."""
    seen = zip(*distributed.all_gather_object((found.terms, found.gradients, found.weights)), strict=True)
    # Each name once, whichever process it comes from.
    terms, gradients, weights = (list(dict.fromkeys(chain.from_iterable(part))) for part in seen)
    said = [f"the loss ({', '.join(terms)})"] if terms else []
    for names, what in ((gradients, "the gradient"), (weights, "the weights")):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        said += [f"{what} of {names[0]}{others}"] if names else []
    return " and ".join(said or ["the norm of the gradient"]) + " " + ("are" if len(said) > 1 else "is")


def _write_report(folder: Path, found: Skipped, in_a_row: int, names: Sequence[str]) -> Path | None:
    """Writes what each process knows of the last skipped step; None where it could not be written; collective."""
    # False comes first: what was not finite is named before the rest.
    images = sorted(zip(found.ids, found.views, found.embeddings, strict=True), key=lambda image: image[1] and image[2])
    own = {
        "process": distributed.rank(),
        # JSON knows no NaN.
        "loss": {name: value if math.isfinite(value) else str(value) for name, value in found.loss.items()},
        "gradients": _some(found.gradients),
        "weights": _some(found.weights),
        "images_of_the_step": len(images),
        "images": [
            {"id": number, "name": names[number], "views_finite": views, "embeddings_finite": embeddings}
            for number, views, embeddings in images[:MOST_NAMED]
        ],
    }
    processes = distributed.all_gather_object(own)
    content = {"step": found.step, "epoch": found.epoch, "skipped_in_a_row": in_a_row, "processes": processes}
    written = False
    if distributed.rank() == 0:
        with suppress(OSError):
            write_json(folder / REPORT, content)
            written = True
    return folder / REPORT if distributed.any_over_ranks(written) else None


def _some(names: Sequence[str]) -> list[str]:
    rest = len(names) - MOST_NAMED
    return [*names[:MOST_NAMED], *([f"and {rest} more"] if rest > 0 else [])]


def _norm(module: nn.Module, device: torch.device) -> Tensor:
    """The norm of a whole gradient: it is finite if all numbers are, and none is beyond 1e19."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return get_total_norm(gradients) if gradients else torch.zeros((), device=device)
