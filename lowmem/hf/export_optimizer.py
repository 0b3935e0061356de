"""A run that another launch can go on with: its newest checkpoint, optimizer state by the names of whole parameters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lowmem.errors import FaultError, RecipeError
from lowmem.hf.adapter_files import adapters_in, write_adapters_
from lowmem.hf.atomic_folder import disk_faults_explained, publish_folder
from lowmem.hf.inference_model import ADAPTER_CONFIG
from lowmem.hf.int8_files import CODES
from lowmem.hf.run_folder import RunFolder
from lowmem.memory.wording import size
from lowmem.run.checkpoint import (
    WHOLE_STATE,
    has_optimizer_state,
    newest_with_optimizer_state,
    seal,
    step_of,
    verify,
)
from lowmem.run.checkpoint_manifest import MANIFEST, DamagedError
from lowmem.run.layouts.whole_state import whole_state_of_one, whole_state_of_pieces

OF_ONE = "optimizer.pt"
OF_EACH = "optimizer-*-of-*.pt"
LEFT_OUT = (OF_ONE, OF_EACH, WHOLE_STATE, "rng_state*.pth", MANIFEST)
"""What the new checkpoint has in another form, or what belongs to one process of the old launch."""


@dataclass(frozen=True)
class ExportedRun:
    """`folder` is a run folder. `parameters` are those with state, `nbytes` what it takes."""

    source: Path
    folder: Path
    processes: int
    parameters: int
    nbytes: int


def export_run(target: str, *, out: str | None = None) -> ExportedRun:
    """Write the run `target` anew with optimizer state that any number of processes and any strategy goes on with.

    out: a folder that does not exist yet, by default `target` with -whole at its end. The whole state is in memory at
    once. Raises RecipeError for a folder that is no run with optimizer state, FaultError for damage and a full disk.
    """
    run = RunFolder(Path(target))
    if not run.recipe.is_file():
        raise RecipeError(
            f"{target} is not a run folder: it holds no recipe.yaml. --optimizer exports a run, by its folder."
        )
    source = newest_with_optimizer_state(run.checkpoints())
    if source is None:
        raise RecipeError(
            f"{target} has no checkpoint with optimizer state. Train with save.every, or stop it with Ctrl-C, which "
            "saves one; the final model has none."
        )
    folder = Path(out) if out is not None else Path(f"{target.rstrip('/')}-whole")
    if folder.exists():
        raise RecipeError(f"{folder} exists and is not overwritten. Choose another folder with --out.")
    try:
        verify(source)
    except DamagedError as damage:
        raise FaultError(
            f"{source} is damaged: {damage}. lowmem train goes on from the last good one."
        ) from damage
    files = _state_files(source)
    whole = _whole_state(source, files)
    unfinished = folder.with_name(f".{folder.name}.saving")
    try:
        with disk_faults_explained("The exported run", source):
            _write(run, source, whole, unfinished)
            publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    nbytes = sum(tensor.nbytes for state in whole["state"].values() for tensor in state.values())
    return ExportedRun(source, folder, len(files), len(whole["state"]), nbytes)


def _state_files(source: Path) -> list[Path]:
    """In the order of the processes."""
    pieces = sorted(source.glob(OF_EACH), key=lambda path: int(path.name.split("-")[1]))
    found = pieces or [path for path in (source / WHOLE_STATE, source / OF_ONE) if path.is_file()][:1]
    if not found:
        raise RecipeError(f"{source} holds no optimizer state that lowmem has written.")
    return found


def _whole_state(source: Path, files: list[Path]) -> dict[str, Any]:
    saved = [torch.load(path, map_location="cpu", weights_only=True) for path in files]
    if files[0].name == WHOLE_STATE:
        return saved[0]
    adapters = adapters_in(source) if (source / ADAPTER_CONFIG).is_file() else None
    shapes = (
        _shapes(source) if adapters is None else {name: tuple(each.shape) for name, each in adapters.items()}
    )
    whole = (
        whole_state_of_one(saved[0], shapes)
        if files[0].name == OF_ONE
        else whole_state_of_pieces(saved, shapes)
    )
    if adapters is not None:
        # DeepSpeed computes with coarser adapters than it steps, and others have nothing but the finest ones.
        whole["weights"] = adapters | whole["weights"]
    return whole


def _shapes(source: Path) -> Mapping[str, tuple[int, ...]]:
    """Of every weight; one in int8 has the shape of its codes."""
    found_shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(source.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                parameter = f"{name.removesuffix(CODES)}weight" if name.endswith(f".{CODES}") else name
                found_shapes[parameter] = tuple(stored.get_slice(name).get_shape())
    return found_shapes


def _write(run: RunFolder, source: Path, whole: Mapping[str, Any], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / source.name
    kept = [path for path in source.iterdir() if not any(path.match(pattern) for pattern in LEFT_OUT)]
    needed = sum(path.stat().st_size for path in kept)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise FaultError(
            f"The disk of {folder.parent} has {size(free)} free and the weights need {size(needed)}. Free some "
            "space, or name a folder on another disk with --out."
        )
    checkpoint.mkdir(parents=True)
    for path in kept:
        shutil.copyfile(path, checkpoint / path.name)
    if (source / ADAPTER_CONFIG).is_file():
        write_adapters_(checkpoint, whole["weights"])
    torch.save(dict(whole), checkpoint / WHOLE_STATE)
    seal(checkpoint, step=step_of(source) or 0)
    assert has_optimizer_state(checkpoint)
    shutil.copyfile(run.recipe, folder / run.recipe.name)
    if run.metrics.path.is_file():
        shutil.copyfile(run.metrics.path, folder / run.metrics.path.name)
