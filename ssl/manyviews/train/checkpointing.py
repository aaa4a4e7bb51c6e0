"""The state of pretraining as a checkpoint holds it, when it is saved, and how it is restored."""

from collections.abc import Callable, Mapping
from typing import Any

from manyviews.data import Images, listed, newly_unreadable
from manyviews.run.checkpoints import Checkpoint, optimiser_shards, restore_optimiser
from manyviews.train.budget import Budget
from manyviews.train.components import Components
from manyviews.train.resume import check_lengths
from manyviews.train.session import Session


class Checkpointing:
    """Saves pretraining every `train.save_minutes`, after the best measurement and at its end."""

    def __init__(
        self,
        components: Components,
        images: Images,
        budget: Budget,
        session: Session,
        found: Checkpoint | None,
        known: Callable[[int], dict[str, Any]],
    ) -> None:
        """From the checkpoint that is resumed on; `known` gives the metadata of a step that the components lack."""
        self._components, self._images, self._known = components, images, known
        self._budget, self._session, self._begun = budget, session, found.step if found else 0
        before, now = (found.metadata.get("recipe") if found else None), components.recipe.model_dump(mode="json")
        self._extended = before is not None and any(
            before["train"].get(key) != now["train"][key] for key in ("epochs", "minutes")
        )

    def save_if_due(self, step: int, *, best: bool) -> None:
        """Goes on with what is being written, and saves where it is time; collective.

        Args:
            step: the steps so far.
            best: whether the step has the best measurement.
        """
        saver = self._session.saver
        self._session.poll_saver()
        # After the first step: before it, an optimiser keeps nothing yet.
        if step == self._begun + 1:
            lacking = saver.room_warning(state_of(self._components, self._images, step, {}))
            if lacking:
                self._session.console.warn(lacking)
        late = not saver.under_way and self._budget.save_is_due(self._components.recipe.train.save_minutes)
        # An extended run is saved at once: from here on its checkpoints say what it goes on with.
        if late or best or (self._extended and step == self._begun):
            with self._budget.saving():
                self.save(step)

    def save(self, step: int) -> None:
        """Begins to write a checkpoint, which is done beside the next steps; collective."""
        components, run = self._components, self._session.run
        checkpoint = state_of(components, self._images, step, self._known(step))
        weights = {f"objective.{name}": value.detach() for name, value in components.objective.named_parameters()}
        # Of an objective's buffers, one that is not known yet may be NaN.
        for part in checkpoint.parts.keys() - {"objective"}:
            weights |= {f"{part}.{key}": value for key, value in checkpoint.parts[part].items()}
        if run is not None and (unreadable := newly_unreadable(self._images)):
            run.unreadable(listed(unreadable))
        self._session.save(checkpoint, weights)


def state_of(components: Components, images: Images, step: int, known: Mapping[str, Any]) -> Checkpoint:
    """Everything that a run needs to go on, with the metadata that is `known` of it; nothing is copied."""
    lengths = components.objective.shards()
    parts = {"encoder": components.encoder.state_dict(), "objective": components.objective.state_dict()}
    if components.twin is not None:
        parts["twin"] = components.twin.state_dict()
    owned = components.objective.named_parameters()
    sharded = [(parameter, lengths[name]) for name, parameter in owned if name in lengths]
    shards = {f"objective.{name}": length for name, length in lengths.items()}
    shards |= optimiser_shards(components.optimiser, sharded)
    metadata = {**known, "images": images.fingerprint, "channels": images.channels, "held_out": components.held_out}
    metadata["recipe"] = components.recipe.model_dump(mode="json")
    if components.accelerator.scaler is not None:
        metadata["scaler"] = components.accelerator.scaler.state_dict()
    return Checkpoint(step, parts, components.optimiser.state_dict(), metadata, shards)


def restore(components: Components, found: Checkpoint) -> None:
    """Gives the components the state of a checkpoint.

    Raises:
        ValueError: if it is of other parts.
    """
    check_lengths(found, components.objective.shards())
    try:
        components.encoder.load_state_dict(dict(found.parts["encoder"]))
        components.objective.load_state_dict(dict(found.parts["objective"]))
        if components.twin is not None:
            components.twin.load_state_dict(dict(found.parts["twin"]))
        restore_optimiser(components.optimiser, found.optimiser)
        if components.accelerator.scaler is not None:
            components.accelerator.scaler.load_state_dict(found.metadata["scaler"])
    except (KeyError, RuntimeError) as problem:
        raise ValueError(
            f"the checkpoint of step {found.step:,} is of other parts than the recipe's: {problem}"
        ) from None
