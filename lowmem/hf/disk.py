"""Is there room for what a run will write? Asked before the first step, not found out at the last."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowmem.errors import FaultError
from lowmem.hf.make_optimizer import float_bytes, model_bytes
from lowmem.hf.run_folder import RunFolder
from lowmem.memory.wording import size
from lowmem.recipe.schema import Recipe
from lowmem.run.checkpoint import newest_with_optimizer_state


@dataclass(frozen=True)
class Room:
    """What a run will write into `folder`. `weights_bytes` is a checkpoint without its optimizer state."""

    folder: Path
    weights_bytes: int
    checkpoints_to_come: int
    optimizer_states_to_come: int
    final_model_bytes: int

    def refuse_too_small(self, optimizer_state_bytes: int) -> None:
        """Raises FaultError where the disk does not have it. The bytes are those of one checkpoint's state."""
        refuse_too_small_disk(
            self.folder,
            checkpoint_bytes=self.weights_bytes,
            checkpoints_to_come=self.checkpoints_to_come,
            final_model_bytes=self.final_model_bytes,
            optimizer_state_bytes=optimizer_state_bytes,
            optimizer_states_to_come=self.optimizer_states_to_come,
        )


def room_for(recipe: Recipe, folder: RunFolder, model: nn.Module, weights_bytes: int) -> Room:
    """`model` is whole; `weights_bytes` is what a checkpoint keeps of it."""
    to_come = checkpoints_to_come(recipe, folder)
    states_to_come = optimizer_states_to_come(
        recipe.save.optimizer_states,
        checkpoints_to_come=to_come,
        has_one=newest_with_optimizer_state(folder.checkpoints()) is not None,
    )
    final = final_model_bytes(recipe, model, weights_bytes)
    return Room(folder.path, weights_bytes, to_come, states_to_come, final)


def refuse_too_small_disk(
    folder: Path,
    *,
    checkpoint_bytes: int,
    checkpoints_to_come: int,
    final_model_bytes: int,
    optimizer_state_bytes: int = 0,
    optimizer_states_to_come: int = 0,
) -> None:
    """Raise FaultError when `folder`'s disk cannot hold the checkpoints and the final model of this run.

    `checkpoint_bytes` is one checkpoint without its optimizer state. Both counts are one more than are
    kept: the new one is complete before the oldest goes.
    """
    needed_bytes = (
        checkpoint_bytes * checkpoints_to_come
        + optimizer_state_bytes * optimizer_states_to_come
        + final_model_bytes
    )
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        states = ""
        if optimizer_states_to_come:
            states = (
                f", {optimizer_states_to_come} of them with {size(optimizer_state_bytes)} of optimizer state"
            )
        raise FaultError(
            f"The disk of {folder} has {size(free_bytes)} free, this run needs {size(needed_bytes)}: "
            f"{checkpoints_to_come} checkpoint(s) of {size(checkpoint_bytes)}{states}, and a final model of "
            f"{size(final_model_bytes)}. Free some space, point save.dir at another disk, "
            "lower save.keep, or leave out save.every or set save.model=false."
        )


def optimizer_states_to_come(kept: str, *, checkpoints_to_come: int, has_one: bool) -> int:
    """How many checkpoints of this run will hold an optimizer state at once, less the one that is there.

    kept: save.optimizer_states. With `newest` the old state goes when the new one is complete, so there are two.
    """
    if kept == "all":
        return checkpoints_to_come
    return min(checkpoints_to_come, 1 if has_one else 2)


def checkpoints_to_come(recipe: Recipe, folder: RunFolder) -> int:
    """Checkpoints the disk must have room for: those kept and one more, less those that are there.

    A run that saves none regularly still needs room for the one of an interrupt.
    """
    if recipe.save.every is None:
        return 1
    return recipe.save.keep + 1 - min(len(folder.checkpoints()), recipe.save.keep)


def final_model_bytes(recipe: Recipe, model: nn.Module, saved_bytes: int) -> int:
    """Of int8 weights that become float ones, both are on the disk for a while."""
    if not recipe.save.model:
        return 0
    if recipe.model.weights == "int8" and not recipe.save.int8:
        return saved_bytes + float_bytes(model)
    return model_bytes(model) if recipe.save.merge_lora else saved_bytes
