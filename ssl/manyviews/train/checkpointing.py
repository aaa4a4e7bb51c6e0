"""The state of pretraining as a checkpoint holds it, and how it is restored."""

from collections.abc import Mapping
from typing import Any

from manyviews.data import Images
from manyviews.run.checkpoints import Checkpoint, optimiser_shards, restore_optimiser
from manyviews.train.components import Components
from manyviews.train.resume import check_lengths


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
