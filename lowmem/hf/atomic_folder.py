"""Write a folder under a temporary name and rename it when it is complete and on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from lowmem.errors import FaultError


def publish_folder(unfinished: Path, final: Path) -> None:
    """Flush every file of `unfinished` to the disk, then give it its name, replacing what had it."""
    for file in [*unfinished.rglob("*"), unfinished]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    retired = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
    unfinished.rename(final)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def disk_faults_explained(what: str, last_good: Path | None) -> Iterator[None]:
    """Turn a full or failing disk while `what` is written into a FaultError that names what is intact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its file writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise  # FaultError too, which says its own
        intact = (
            f"The last complete checkpoint is {last_good}."
            if last_good
            else "No checkpoint was complete yet."
        )
        raise FaultError(
            f"{what} could not be written: {error}. {intact} Free some disk space and run again."
        ) from error


@contextmanager
def checkpoint_faults_explained(checkpoint: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint makes the libraries raise into a FaultError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # A file that was cut short or overwritten raises whatever its reader stumbles over.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FaultError(
            f"{checkpoint} cannot be read: {reason} Delete this folder to continue from the checkpoint before it."
        ) from error
