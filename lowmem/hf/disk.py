"""Is there room for what a run will write? Asked before the first step, not found out at the last."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowmem.errors import FaultError
from lowmem.memory.wording import size


def refuse_too_small_disk(
    folder: Path, *, checkpoint_bytes: int, checkpoints_to_come: int, final_model_bytes: int
) -> None:
    """Raise FaultError when `folder`'s disk cannot hold the checkpoints and the final model of this run.

    `checkpoints_to_come` counts one more than are kept: the new one is complete before the oldest goes.
    """
    needed_bytes = checkpoint_bytes * checkpoints_to_come + final_model_bytes
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise FaultError(
            f"The disk of {folder} has {size(free_bytes)} free, this run needs {size(needed_bytes)}: "
            f"{checkpoints_to_come} checkpoint(s) of {size(checkpoint_bytes)} and a final model of "
            f"{size(final_model_bytes)}. Free some space, point save.dir at another disk, "
            "lower save.keep, or leave out save.every or set save.model=false."
        )
