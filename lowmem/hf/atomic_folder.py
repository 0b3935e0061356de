"""Write a folder under a temporary name and rename it when it is complete and on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from lowmem.errors import FaultError, RefusedError
from lowmem.run.one_voice import has_lost_a_process


def publish_folder(unfinished: Path, final: Path) -> None:
    """Flush every file of `unfinished` to the disk, then give it its name, replacing what had it.

    A crash while it replaces is mended by `recover_replaced_`.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush_to_disk(path)
    retired = _retired(final)
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
    unfinished.rename(final)
    _flush_to_disk(final.parent)  # the name too survives a power cut
    shutil.rmtree(retired, ignore_errors=True)


def recover_replaced_(final: Path) -> None:
    """Undo a `publish_folder` that was killed after it took the old folder away and before the new one came."""
    retired = _retired(final)
    if retired.is_dir() and not final.exists():
        retired.rename(final)
    shutil.rmtree(retired, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a full disk or a crash leaves the old one."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def delete_folder_(folder: Path) -> None:
    """Delete under another name, so that a crash never leaves half of it under its own."""
    doomed = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _retired(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_faults_explained(what: str, last_good: Path | Callable[[], Path | None] | None) -> Iterator[None]:
    """Turn a full or failing disk while `what` is written into a FaultError that names what is intact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its file writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise  # FaultError too, which says its own
        raise FaultError(
            f"{what} could not be written: {error}. {what_is_intact(last_good)} Free some disk space and run again."
        ) from error


@contextmanager
def checkpoint_faults_explained(checkpoint: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint makes the libraries raise into a FaultError that names it."""
    try:
        yield
    except (RefusedError, torch.OutOfMemoryError):
        raise  # nothing is damaged
    except RuntimeError as error:
        if has_lost_a_process(error):
            raise
        raise _unreadable(checkpoint, error) from error
    # A file that was cut short or overwritten raises whatever its reader stumbles over.
    except Exception as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> FaultError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return FaultError(
        f"{checkpoint} cannot be read: {reason} Delete this folder to continue from the checkpoint before it."
    )


@contextmanager
def worker_faults_explained(last_good: Callable[[], Path | None] | None) -> Iterator[None]:
    """Turn the death of a process that prepares batches into a FaultError that names what is intact."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise FaultError(
            f"A process that prepares batches ended: {str(error).splitlines()[0]} {what_is_intact(last_good)} "
            "The usual cause is too little host memory, or too small a /dev/shm; free some and run again."
        ) from error


def what_is_intact(last_good: Path | Callable[[], Path | None] | None) -> str:
    """`last_good` as it is now, after the fault."""
    checkpoint = last_good() if callable(last_good) else last_good
    return (
        f"The last complete checkpoint is {checkpoint}." if checkpoint else "No checkpoint was complete yet."
    )
