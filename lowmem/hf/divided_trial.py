"""Before the first step of a divided run: does the disk hold what all processes will save, and is it read back?

Every process knows the bytes of its own file once the model is divided. All hear of all, look at the disk that they
see, and write a checkpoint on trial together; a problem that one has is raised in all of them, the same everywhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import FaultError
from lowmem.hf.disk import Room
from lowmem.hf.sharded_trainer import ShardedTrainer
from lowmem.hf.trainer_checkpoints import check_trial, trial_explained
from lowmem.memory.wording import size
from lowmem.run.checkpoint_probe import checksum_bytes_per_second, piece_file_bytes
from lowmem.run.layouts.saved_pieces import file_name
from lowmem.run.one_voice import all_or_none

SEEN_WITHIN_SECONDS = 10.0
"""A network's file system may show late what another machine has written."""


def try_divided(
    trainer: ShardedTrainer, room: Room, say: Callable[[str], Any], total_steps: int, *, writes: bool
) -> None:
    """To be called by every process; `writes` asks for a trial beside the look at the disk.

    Raises FaultError for a disk that is too small, for what cannot be written or read back, and for a run folder that
    is not the same for all processes.
    """
    assert trainer.steps_in_pieces is not None
    assert trainer.run_folder is not None
    own = torch.tensor([piece_file_bytes(trainer.steps_in_pieces.pieces)], device=trainer.args.device)
    state_bytes = int(trainer.accelerator.gather(own).sum())
    with all_or_none():
        room.refuse_too_small(state_bytes)
    if not writes:
        return
    begin, trial, newest = (
        time.perf_counter(),
        trainer.run_folder.on_trial,
        trainer.run_folder.newest_checkpoint,
    )
    try:
        with all_or_none(), trial_explained(newest):
            trainer.write_trial(trial, total_steps)
        trainer.accelerator.wait_for_everyone()  # a launcher without a store lets them part
        with all_or_none(), trial_explained(newest):
            if trainer.args.should_save:
                refuse_other_folders(trial, trainer.args.world_size)
                check_trial(trial)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(trainer.run_folder.unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    say(trial_summary(time.perf_counter() - begin, room.weights_bytes + state_bytes))


def refuse_other_folders(trial: Path, processes: int) -> None:
    """Raises FaultError where a process has written its file to a place that this one does not see."""

    def missing() -> list[int]:
        return [rank for rank in range(processes) if not (trial / file_name(rank, processes)).is_file()]

    end = time.monotonic() + SEEN_WITHIN_SECONDS
    while missing() and time.monotonic() < end:
        time.sleep(0.1)
    if unseen := missing():
        raise FaultError(
            f"What process {unseen[0]} has written to {trial.parent.parent} is not there on the first machine: the "
            "run folder is another one on each. Point save.dir at a disk that all machines share."
        )


def trial_summary(seconds: float, checkpoint_bytes: int) -> str:
    checksum_seconds = checkpoint_bytes / checksum_bytes_per_second()
    return (
        f"checkpoints: {size(checkpoint_bytes)} each, checksums take {checksum_seconds:.2g} s of it; a trial was "
        f"written and read back in {seconds:.2g} s"
    )
