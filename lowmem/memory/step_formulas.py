"""What the update of one parameter holds beside weight, gradient and state, at its fullest. Imports no torch.

Element-wise rules work on tiles of n = 2^21 values (a smaller parameter whole), in float32; bytes:

    update       gradient, each bfloat16 state, the direction: 4 n each
    write back   each bfloat16 state, the direction: 4 n each; the weight 4 n, its noise 4 n, its rounded copy 2 n
    next tile    what the one before made, beside its own update
    save         what is made, beside the rounding of a bfloat16 state, 6 n, or the coding of an int8 one

Nothing but a scalar where torch's fused kernel does it all: weight, gradient and state of one dtype, and no stochastic
rounding. GaLore's matrix (m, n) with m <= n of rank r, tiles of t values, a width of w = r + 16:

    project      basis 4 m r, its transpose 4 m r, R 4 r n, a tile of the gradient 4 t
    inner Adam   basis 4 m r; R, both moments and the direction 4 r n each
    write back   basis 4 m r; moments and direction 4 r n each; a tile's weight, noise, rounded copy 10 t
    refresh      old basis 4 m r, start 4 m w, product and scaled product 4 w n each, qr's result 4 w n
    compare      where it is lazy: both bases 4 m r each, and two float32 copies of a tile of the gradient, or
                 a transposed basis 4 m r, R 4 r n and a copy of one

Rules whose direction is made a block of rows at a time have pages of their own, `row_block_formulas` and
`split_formulas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.ledger import rounded
from lowmem.memory.row_block_formulas import ROW_BLOCKS, row_block_bytes, unfactored_bytes
from lowmem.memory.split_formulas import split_bytes
from lowmem.memory.state_formulas import (
    Settings,
    StateTensor,
    frugal_rule,
    is_low_rank,
    is_matrix,
    state_values,
    stored_itemsize,
    with_defaults,
)
from lowmem.memory.update_tiles import saving_bytes

OVERSAMPLE = 16
"""Columns of a subspace iteration beyond the rank, as in `lowmem.numerics.linalg`; a test holds the two equal."""

SVD_COPIES, QR_COPIES = 3, 2
"""Workspaces on CUDA, in float32 copies of the matrix, as `lowmem.memory.workspaces` states them."""


def update_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Bytes of temporaries at the fullest moment of updating a parameter, a refresh included."""
    settings = with_defaults(algorithm, settings)
    if algorithm in _LOW_RANK and is_low_rank(settings, shape):
        project = _project_bytes(settings, shape, itemsize)
        inner = _projected_update_bytes(settings, shape, itemsize, holds_gradient=True)
        return max(project, inner, _refresh_bytes(settings, shape, itemsize, on_cuda))
    if algorithm in ROW_BLOCKS and is_matrix(shape):
        return row_block_bytes(algorithm, settings, shape, itemsize)
    if algorithm == "frugal" and frugal_rule(settings, shape) == "split":
        return split_bytes(settings, shape, itemsize)
    if algorithm == "adafactor":
        return unfactored_bytes(settings, shape, itemsize)
    return _element_bytes("adamw" if algorithm == "sinkgd" else algorithm, settings, shape, itemsize)


_LOW_RANK = frozenset({"galore", "q_galore"})


@dataclass(frozen=True)
class Projected:
    """A matrix whose rule sees its gradient through a projection only. Bytes."""

    wide: int
    """The projected gradient in float32."""
    accumulator: int
    """The projected gradient as it is added up over micro-batches."""
    refresh: int
    """Temporaries of fitting a basis, beside the whole gradient; of the others likewise."""
    project: int
    """... of projecting, the result included."""
    update: int
    """... of an update from the accumulator."""
    update_wide: int
    """... of one from a float32 projection."""


def projected(
    algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool
) -> Projected | None:
    """None for a parameter whose rule needs the whole gradient."""
    settings = with_defaults(algorithm, settings)
    if algorithm not in _LOW_RANK or not is_low_rank(settings, shape):
        return None
    _, long, rank = _sizes(settings, shape)
    stored = {"param": itemsize, "bf16": 2, "fp32": 4}[settings["accumulator"]]
    wide, kept = rounded(4 * rank * long), rounded(stored * rank * long)
    update_wide = _projected_update_bytes(settings, shape, itemsize, holds_gradient=False)
    # Only rule and its state see the float32 copy of the accumulator: it is gone when the weight is written.
    inner = _projected_update_bytes(settings, shape, itemsize, holds_gradient=True)
    return Projected(
        wide=wide,
        accumulator=kept,
        refresh=_refresh_bytes(settings, shape, itemsize, on_cuda),
        project=max(_project_bytes(settings, shape, itemsize), wide + (kept if stored < 4 else 0)),
        update=inner if stored < 4 else update_wide,
        update_wide=update_wide,
    )


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
    kept = copied + 4 * _DIRECTIONS[algorithm](settings, shape)
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
        if each.role != "scalar"
    ]


def _element_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> int:
    states = [each for each in state_values(algorithm, settings, shape).values() if each.role != "scalar"]
    tensors = [stored_itemsize(each, settings, itemsize) for each in states]
    is_stochastic = settings["rounding"] == "stochastic"
    n = min(math.prod(shape), update_tiles.TILE_NUMEL)
    refresh = (4 * n if itemsize < 4 else 0) + 4 * n if algorithm == "sgd_sai" else 0
    kept = left_by_a_tile(algorithm, settings, shape, itemsize)
    if kept is None:
        return refresh
    gradient = 4 if itemsize < 4 else 0
    direction = 4 * _DIRECTIONS[algorithm](settings, shape)
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
    has_kernel = algorithm != "frugal" or frugal_rule(settings, shape) in ("adam", "momentum")
    is_exact = itemsize == 4 or settings["rounding"] != "stochastic"
    if has_kernel and is_exact and all(each == itemsize for each in tensors):
        return None
    made = 4 * sum(each < 4 for each in tensors) + 4 * _DIRECTIONS[algorithm](settings, shape)
    gradient = 4 if itemsize < 4 else 0
    return made + (gradient if algorithm == "sgd" and not settings["momentum"] else 0)


_DIRECTIONS: dict[str, Callable[[Settings, Shape], int]] = {
    "adamw": lambda settings, shape: 1,
    "galore": lambda settings, shape: 1,
    "q_galore": lambda settings, shape: 1,
    "sgd": lambda settings, shape: int(settings["nesterov"]),
    "sgd_sai": lambda settings, shape: 1,
    "frugal": lambda settings, shape: int(frugal_rule(settings, shape) != "momentum"),
}
"""Float32 tensors of the tile's size that a rule makes for its direction. Without momentum SGD's is the gradient."""


def _project_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """From the whole gradient to its projection in float32, which is among them."""
    short, long, rank = _sizes(settings, shape)
    tile = min(short * long, update_tiles.TILE_NUMEL)
    basis = 4 * short * rank
    return (
        _copies(settings, shape, itemsize, {"basis": basis})
        + basis
        + 4 * rank * long
        + (4 * tile if itemsize < 4 else 0)
    )


def _projected_update_bytes(settings: Settings, shape: Shape, itemsize: int, *, holds_gradient: bool) -> int:
    """From the projected gradient to the written weight; while the rule works it holds a float32 copy of that."""
    short, long, rank = _sizes(settings, shape)
    tile = min(short * long, update_tiles.TILE_NUMEL)
    low = 4 * rank * long
    loaded = _copies(
        settings, shape, itemsize, {"basis": 4 * short * rank, "exp_avg": low, "exp_avg_sq": low}
    )
    rounds = 6 if settings["rounding"] == "stochastic" else 0
    saving = [
        saving_bytes(each, settings, itemsize, rank * long)
        for name, each in state_values("galore", settings, shape).items()
        if name != "basis"
    ]
    inner = loaded + low + (low if holds_gradient else 0)
    saved = loaded + low + max(saving)
    written = loaded + low + ((4 + rounds) * tile if itemsize < 4 else 0)
    return max(inner, saved, written)


def _copies(settings: Settings, shape: Shape, itemsize: int, sizes: dict[str, int]) -> int:
    """Of state that is loaded as float32, `sizes` bytes each; what is float32 already takes none."""
    tensors = state_values("galore", settings, shape)
    return sum(size for name, size in sizes.items() if stored_itemsize(tensors[name], settings, itemsize) < 4)


def _refresh_bytes(settings: Settings, shape: Shape, itemsize: int, on_cuda: bool) -> int:
    short, long, rank = _sizes(settings, shape)
    whole, old = 4 * short * long, 4 * short * rank
    basis = StateTensor(short * rank, "basis")
    saved = old + saving_bytes(basis, settings, itemsize, short * rank)
    if settings["projection"] == "svd":
        copy = whole if itemsize < 4 else 0
        factors = 4 * (short * short + short + short * long)
        return max(old + copy + factors + (SVD_COPIES * whole if on_cuda else 0), saved)
    width = min(short, rank + OVERSAMPLE)
    start, product = 4 * short * width, 4 * width * long
    tile = 4 * min(short * long, update_tiles.TILE_NUMEL) if itemsize < 4 else 0
    multiplied = start + max(start + product + tile, 2 * product)
    orthonormal = start + 2 * product + (QR_COPIES * product if on_cuda else 0)
    compared = _comparison_bytes(settings, shape, itemsize)
    return max(old + max(multiplied, orthonormal), saved, compared)


def _comparison_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of the similarity of the old basis and the new one, which a lazy schedule asks for."""
    if not settings.get("lazy"):
        return 0
    short, long, rank = _sizes(settings, shape)
    tile = 4 * min(short * long, update_tiles.TILE_NUMEL)
    copy = tile if itemsize < 4 else 0
    basis, low = 4 * short * rank, 4 * rank * long
    return 2 * basis + max(copy + tile, basis + low + copy, low + min(low, 4 * update_tiles.TILE_NUMEL))


def _sizes(settings: Settings, shape: Shape) -> tuple[int, int, int]:
    *batch, rows, columns = shape
    return min(rows, columns), max(rows, columns) * math.prod(batch), settings["rank"]
