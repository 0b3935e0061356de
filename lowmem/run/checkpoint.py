"""Checkpoint folders: seal one, verify one, choose the one to continue from, drop what older ones need no more."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lowmem.run.checkpoint_manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)

CHECKPOINT_PREFIX = "checkpoint-"
OPTIMIZER_STATE = ("optimizer.pt", "optimizer-*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files, and patterns of files, that only who continues the training needs."""
WHOLE_STATE = "optimizer-whole.pt"
"""Optimizer state that any launch can load, as `lowmem export --optimizer` writes it."""


def step_of(checkpoint: Path) -> int | None:
    """120 for .../checkpoint-120; None for other names."""
    number = checkpoint.name.removeprefix(CHECKPOINT_PREFIX)
    is_plain = number.isascii() and number.isdigit() and number != checkpoint.name
    return int(number) if is_plain else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Every folder named checkpoint-<step> that holds something, oldest first, damaged ones too."""
    found = [path for path in folder.glob(CHECKPOINT_PREFIX + "*") if step_of(path) is not None]
    return sorted((path for path in found if _holds_something(path)), key=lambda path: step_of(path) or 0)


def seal(folder: Path, *, step: int) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    write_manifest(folder, describe_files(folder, step=step))


def verify(checkpoint: Path, *, checksums: bool = True) -> Manifest:
    """Raises DamagedError when `checkpoint` is not what was saved as this step."""
    try:
        manifest = verify_files(checkpoint, checksums=checksums)
    except OSError as error:  # such as that of a folder which another process sets aside meanwhile
        raise DamagedError(f"{error.filename or checkpoint} cannot be read ({error.strerror})") from error
    if manifest.step != step_of(checkpoint):
        raise DamagedError(f"{MANIFEST} belongs to step {manifest.step}")
    return manifest


def is_complete(checkpoint: Path) -> bool:
    """Every file is there in the size that was written; the content is not looked at."""
    try:
        verify(checkpoint, checksums=False)
    except DamagedError:
        return False
    return True


def has_optimizer_state(checkpoint: Path) -> bool:
    """False when a newer checkpoint took it over, or the manifest cannot be read."""
    try:
        return any(_is_optimizer_state(name) for name in read_manifest(checkpoint).files)
    except DamagedError:
        return False


def newest_with_optimizer_state(checkpoints: Iterable[Path]) -> Path | None:
    able = [path for path in checkpoints if has_optimizer_state(path)]
    return max(able, key=lambda path: step_of(path) or 0, default=None)


def drop_optimizer_state_(checkpoint: Path) -> None:
    """Delete what only a continued training needs. A crash in between leaves a valid checkpoint.

    A damaged checkpoint is left as it is.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError:
        return
    reduced = manifest.without([name for name in manifest.files if _is_optimizer_state(name)])
    if reduced != manifest:
        write_manifest(checkpoint, reduced)
    for name in reduced.dropped:
        (checkpoint / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Damage:
    checkpoint: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.checkpoint.name}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint without damage, None where there is none, and the damaged ones that are newer."""

    checkpoint: Path | None
    damaged: list[Damage]


def choose_newest_good(checkpoints: list[Path]) -> Choice:
    """`checkpoints`: oldest first. Reads every file of the newest, of older ones only where it is damaged."""
    damaged = []
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except DamagedError as error:
            damaged.append(Damage(checkpoint, str(error)))
        else:
            return Choice(checkpoint, damaged)
    return Choice(None, damaged)


def set_aside_(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; returns its new place."""
    place = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while place.exists():
        number += 1
        place = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    os.rename(checkpoint, place)
    return place


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False  # a file, or gone


def _is_optimizer_state(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OPTIMIZER_STATE)
