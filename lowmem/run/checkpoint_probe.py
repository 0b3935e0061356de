"""A checkpoint on trial, before the first step: is everything that a run will save written and read back?"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowmem.numerics.held_weights import numel_of
from lowmem.optim import LowMemOptimizer, registry
from lowmem.run.checkpoint_manifest import checksum_of_stream
from lowmem.run.checkpoint_tensors import write_safetensors
from lowmem.run.layouts.piece_optimizer import PieceOptimizer
from lowmem.run.layouts.saved_pieces import own_weights, saved_pieces

RATE_BYTES = 2**24


def state_in_small(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` will hold after a step, every tensor cut down to one value.

    Allocates nothing of the state's own size. An optimizer that declares no state gives what it has.
    """
    if not isinstance(optimizer, LowMemOptimizer):
        return _in_small(optimizer.state_dict())
    state: dict[int, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        owner = registry.optimizer_class(group["algorithm"])
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            if not param.requires_grad or numel_of(param) == 0:
                continue
            rule = owner.rule(group, optimizer._whole_shape(param))
            declared: dict[str, Tensor] = {}
            for codec in optimizer._codecs(param, group, rule).values():
                declared.update(codec.allocate(torch.device("meta")))
            state[index] = _in_small({**declared, "step": torch.zeros((), dtype=torch.float32)})
    return {"state": state, "param_groups": saved["param_groups"]}


def pieces_in_small(pieces: PieceOptimizer) -> dict[str, Any]:
    """What `saved_pieces` will hold after a step, every tensor cut down to one value."""
    return {**_in_small(saved_pieces(pieces)), "state": state_in_small(pieces)}


def piece_file_bytes(pieces: PieceOptimizer) -> int:
    """What the tensors that this process saves will take: its state, and weights that nobody else keeps."""
    return pieces.state_bytes() + sum(weight.nbytes for weight in own_weights(pieces).values())


def write_safetensors_in_small(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """As `write_safetensors`, with one value for each tensor."""
    write_safetensors(_in_small(dict(tensors)), path, metadata)


def read_back(folder: Path) -> None:
    """Load every file of `folder` as who resumes does: JSON, safetensors, and torch files with weights_only.

    Raises ValueError, naming the file, for one that cannot be loaded.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth"):
                torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # not a mapping
                        file.get_tensor(name)
        # What a reader raises for a file it cannot load is not one kind of error.
        except Exception as error:
            raise ValueError(f"{path.name} cannot be read back: {str(error).splitlines()[0]}") from error


def checksum_bytes_per_second() -> float:
    """Measured here and now, on 16 MiB that are read as a file in the memory's cache is."""
    data = io.BytesIO(bytes(RATE_BYTES))
    begin = time.perf_counter()
    checksum_of_stream(data)
    return RATE_BYTES / max(time.perf_counter() - begin, 1e-9)


def _in_small(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(1 if value.dim() else (), dtype=value.dtype)
    if isinstance(value, dict):
        return {name: _in_small(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_in_small(one) for one in value)
    return value
