"""What the update of one parameter holds beside weight, gradient and state, at its fullest. Imports no torch.

Element-wise rules work on tiles of n = 2^21 values (a smaller parameter whole), in float32; bytes:

    update       gradient, each bfloat16 state, the direction: 4 n each
    write back   each bfloat16 state, the direction: 4 n each; the weight 4 n, its noise 4 n, its rounded copy 2 n
    next tile    what the one before made, beside its own update
    save         what is made, beside the rounding of a bfloat16 state, 6 n, or the coding of an int8 one

8-bit codes of bitsandbytes are read and written by the library's kernel, which on CUDA takes nothing more.

Nothing but a scalar where torch's fused kernel does it all: weight, gradient and state of one dtype, and no stochastic
rounding. Low-rank rules and rules whose direction is made a block of rows at a time have pages of their own:
`low_rank_formulas`, `row_block_formulas`, `split_formulas` and `whitened_formulas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.coded_states import has_codes
from lowmem.memory.frugal_states import frugal_rule
from lowmem.memory.low_rank_formulas import LOW_RANK, low_rank_bytes
from lowmem.memory.row_block_formulas import ROW_BLOCKS, row_block_bytes, unfactored_bytes
from lowmem.memory.split_formulas import split_bytes
from lowmem.memory.state_formulas import state_values, stored_itemsize, with_defaults
from lowmem.memory.state_tensors import UNLOADED, Settings, is_low_rank, is_matrix
from lowmem.memory.update_tiles import saving_bytes
from lowmem.memory.whitened_formulas import WHITENED, whitened_bytes


def update_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Bytes of temporaries at the fullest moment of updating a parameter, a refresh included."""
    settings = with_defaults(algorithm, settings)
    if algorithm in LOW_RANK and is_low_rank(settings, shape):
        return low_rank_bytes(algorithm, settings, shape, itemsize, on_cuda=on_cuda)
    if algorithm in ROW_BLOCKS and is_matrix(shape):
        return row_block_bytes(algorithm, settings, shape, itemsize)
    if algorithm in WHITENED and is_matrix(shape):
        return whitened_bytes(algorithm, settings, shape, itemsize, on_cuda=on_cuda)
    if algorithm == "frugal" and frugal_rule(settings, shape) == "split":
        return split_bytes(settings, shape, itemsize, on_cuda=on_cuda)
    if algorithm == "adafactor":
        return unfactored_bytes(settings, shape, itemsize)
    return _element_bytes("adamw" if algorithm in _ADAM_ELSEWHERE else algorithm, settings, shape, itemsize)


_ADAM_ELSEWHERE = frozenset({"sinkgd", *WHITENED})
"""Optimizers that treat with Adam what is no matrix."""


@dataclass(frozen=True)
class Accumulated:
    """A parameter whose micro-batches are added to its momentum. Bytes of temporaries beside a gradient."""

    add: int
    """... of adding one that is not the last."""
    finish: int
    """... of adding the last and moving the weight."""
    waits_first: bool
    """Whether the first step wants its whole gradient."""


_ACCUMULATE: dict[str, Callable[[Settings], bool]] = {
    "sgd": lambda settings: bool(settings["momentum"]) and not settings["nesterov"],
    "sgd_sai": lambda settings: bool(settings["momentum"]),
}
"""Whose momentum is a sum that micro-batches can be added to."""


def accumulated(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> Accumulated | None:
    """None for a parameter whose gradients are added up by themselves."""
    settings = with_defaults(algorithm, settings)
    if algorithm not in _ACCUMULATE or not _ACCUMULATE[algorithm](settings):
        return None
    tensors = _stored_itemsizes(algorithm, settings, shape, itemsize)
    if any(each < 2 for each in tensors):
        return None  # codes that share a scale are not added to
    n = min(math.prod(shape), update_tiles.TILE_NUMEL)
    next_n = min(math.prod(shape) - n, update_tiles.TILE_NUMEL)
    gradient = 4 if itemsize < 4 else 0
    copied = 4 * sum(each < 4 for each in tensors)
    rounds = 6 if settings["rounding"] == "stochastic" else 0
    saved = rounds if copied else 0
    weight = 4 + rounds if itemsize < 4 else 0
    kept = copied + 4 * _directions(algorithm, settings, shape)
    return Accumulated(
        add=max(gradient + copied, copied + saved) * n,
        finish=max(
            (gradient + kept) * n, (kept + max(weight, saved)) * n, kept * n + (gradient + kept) * next_n
        ),
        waits_first=algorithm == "sgd_sai",
    )


def _stored_itemsizes(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> list[int]:
    return [
        stored_itemsize(each, settings, itemsize)
        for each in state_values(algorithm, settings, shape).values()
        if each.role not in UNLOADED
    ]


def _element_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> int:
    states = [each for each in state_values(algorithm, settings, shape).values() if each.role not in UNLOADED]
    tensors = [stored_itemsize(each, settings, itemsize) for each in states]
    is_stochastic = settings["rounding"] == "stochastic"
    n = min(math.prod(shape), update_tiles.TILE_NUMEL)
    refresh = (4 * n if itemsize < 4 else 0) + 4 * n if algorithm == "sgd_sai" else 0
    kept = left_by_a_tile(algorithm, settings, shape, itemsize)
    if kept is None:
        return refresh
    gradient = 4 if itemsize < 4 else 0
    direction = 4 * _directions(algorithm, settings, shape)
    made = 4 * sum(each < 4 for each in tensors) + direction
    weight = (4 + (6 if is_stochastic else 0)) * n if itemsize < 4 else 0
    saved = max((saving_bytes(each, settings, itemsize, n) for each in states), default=0)
    next_n = min(math.prod(shape) - n, update_tiles.TILE_NUMEL)
    # Reading is fullest at its end only where no direction is made after it.
    reads = 4 if not direction and any(each == 1 for each in tensors) else 0
    return max(
        refresh,
        (gradient + made) * n + reads * min(n, update_tiles.CODED_NUMEL),
        kept * n + max(weight, saved),
        kept * n + (gradient + made) * next_n + reads * min(next_n, update_tiles.CODED_NUMEL),
    )


def left_by_a_tile(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> int | None:
    """Bytes a value that an element-wise update holds until the next one; None where torch's kernels do it all."""
    tensors = _stored_itemsizes(algorithm, settings, shape, itemsize)
    is_exact = itemsize == 4 or settings["rounding"] != "stochastic"
    if (
        _torch_has_a_kernel(algorithm, settings, shape)
        and is_exact
        and all(each == itemsize for each in tensors)
    ):
        return None
    made = 4 * sum(each < 4 for each in tensors) + 4 * _directions(algorithm, settings, shape)
    gradient = 4 if itemsize < 4 else 0
    return made + (gradient if algorithm == "sgd" and not settings["momentum"] else 0)


def _torch_has_a_kernel(algorithm: str, settings: Settings, shape: Shape) -> bool:
    if algorithm == "frugal":
        return frugal_rule(settings, shape) in ("adam", "momentum")
    if algorithm == "adamw8bit":
        return not has_codes(settings, shape)
    return algorithm != "lion8bit"


def _directions(algorithm: str, settings: Settings, shape: Shape) -> int:
    """Float32 tensors of the tile's size made for a direction. Without momentum SGD's is the gradient."""
    if algorithm == "sgd":
        return int(settings["nesterov"])
    return int(algorithm != "frugal" or frugal_rule(settings, shape) != "momentum")
