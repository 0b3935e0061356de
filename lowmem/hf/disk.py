"""Is there room for what a run will write? Asked before the first step, not found out at the last."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowmem.errors import FaultError
from lowmem.memory.wording import size


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
