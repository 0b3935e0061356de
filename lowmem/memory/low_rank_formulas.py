"""What the update of a matrix holds of which a low-rank rule sees the gradient. Imports no torch.

For a matrix (m, n) with m <= n of rank r, tiles of t values, a width of w = r + 16, bytes:

    project      basis 4 m r, its transpose 4 m r, R 4 r n, a tile of the gradient 4 t
    inner Adam   basis 4 m r; R, both moments and the direction 4 r n each
    write back   basis 4 m r; moments and direction 4 r n each; a tile's weight, noise, rounded copy 10 t
    refresh      old basis 4 m r, start 4 m w, product and scaled product 4 w n each, qr's result 4 w n
    choose       "dct": a tile of the gradient 4 t and its transform 4 t; where moments are rotated both new ones 4 r n
                 each, and an old one or the rounding of a new one
    compare      where it is lazy: both bases 4 m r each, and two float32 copies of a tile of the gradient, or
                 a transposed basis 4 m r, R 4 r n and a copy of one

    residual     fira: as inner Adam, and a tile of S 4 t; written as a tile of the direction 4 t, moments and what
                 it is made of 4 r n each, and the tile's weight, noise, rounded copy 10 t
    scaled       apollo: as project and inner Adam, without the basis in the latter; a tile of S 4 t, written as in fira

State that is float32 already is used as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.ledger import rounded
from lowmem.memory.low_rank_states import LOW_RANK_STATES
from lowmem.memory.state_formulas import state_values, stored_itemsize, with_defaults
from lowmem.memory.state_tensors import Settings, StateTensor, is_low_rank
from lowmem.memory.update_tiles import saving_bytes

LOW_RANK = frozenset(LOW_RANK_STATES)
"""Optimizers of which this page knows what a matrix takes."""

OVERSAMPLE = 16
"""Columns of a subspace iteration beyond the rank, as in `lowmem.numerics.linalg`; a test holds the two equal."""

SVD_COPIES, QR_COPIES, FFT_COPIES = 3, 2, 2
"""Workspaces on CUDA, in float32 copies of what is transformed, as `lowmem.memory.workspaces` states them."""


def low_rank_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Temporaries at the fullest moment of updating a matrix or a batch of matrices, a refresh included."""
    if algorithm == "apollo":
        return _scaled_bytes(settings, shape, itemsize)
    settings = _with_basis(algorithm, settings)
    project = project_bytes(settings, shape, itemsize)
    inner = _projected_update_bytes(settings, shape, itemsize, holds_gradient=True)
    is_whole = not _sees_projection_only(algorithm, settings)
    residual = _residual_bytes(settings, shape, itemsize) if is_whole else 0
    return max(project, inner, residual, refresh_bytes(settings, shape, itemsize, on_cuda))


def _sees_projection_only(algorithm: str, settings: Settings) -> bool:
    """Whether the rule of a matrix sees the gradient through its projection only."""
    return algorithm in ("galore", "q_galore") or settings.get("residual") == "none"


def _with_basis(algorithm: str, settings: Settings) -> Settings:
    return {**settings, "projection": "dct"} if algorithm == "dct_adamw" else settings


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
    is_treated = algorithm in LOW_RANK and is_low_rank(settings, shape)
    if not is_treated or not _sees_projection_only(algorithm, settings):
        return None
    settings = _with_basis(algorithm, settings)
    _, long, rank = _sizes(settings, shape)
    stored = {"param": itemsize, "bf16": 2, "fp32": 4}[settings["accumulator"]]
    wide, kept = rounded(4 * rank * long), rounded(stored * rank * long)
    update_wide = _projected_update_bytes(settings, shape, itemsize, holds_gradient=False)
    # Only rule and its state see the float32 copy of the accumulator: it is gone when the weight is written.
    inner = _projected_update_bytes(settings, shape, itemsize, holds_gradient=True)
    return Projected(
        wide=wide,
        accumulator=kept,
        refresh=refresh_bytes(settings, shape, itemsize, on_cuda),
        project=max(project_bytes(settings, shape, itemsize), wide + (kept if stored < 4 else 0)),
        update=inner if stored < 4 else update_wide,
        update_wide=update_wide,
    )


def project_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """From the whole gradient to its projection in float32, which is among them."""
    short, long, rank = _sizes(settings, shape)
    tile = min(short * long, update_tiles.TILE_NUMEL)
    transposed = 4 * short * rank
    return (
        _basis_bytes(settings, shape, itemsize)
        + transposed
        + 4 * rank * long
        + (4 * tile if itemsize < 4 else 0)
    )


def _projected_update_bytes(settings: Settings, shape: Shape, itemsize: int, *, holds_gradient: bool) -> int:
    """From the projected gradient to the written weight; while the rule works it holds a float32 copy of that."""
    short, long, rank = _sizes(settings, shape)
    tile = min(short * long, update_tiles.TILE_NUMEL)
    low = 4 * rank * long
    loaded = _loaded_bytes(settings, shape, itemsize)
    rounds = 6 if settings["rounding"] == "stochastic" else 0
    inner = loaded + low + (low if holds_gradient else 0)
    saved = loaded + low + _saving_bytes(settings, shape, itemsize)
    written = loaded + low + ((4 + rounds) * tile if itemsize < 4 else 0)
    return max(inner, saved, written)


def _residual_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """From the projected gradient to the written weight where a direction is made a tile at a time."""
    _, long, rank = _sizes(settings, shape)
    low, tile = 4 * rank * long, 4 * tile_of_rows(shape)
    narrow = narrow_weight_bytes(settings, shape, itemsize)
    return _loaded_bytes(settings, shape, itemsize) + low + 4 * long + tile + max(low, narrow)


def _scaled_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of an update in which the gradient itself is scaled and the projection is drawn anew."""
    short, long, rank = _sizes(settings, shape)
    low, drawn, tile = 4 * rank * long, 4 * short * rank, 4 * tile_of_rows(shape)
    moments = _copies(settings, shape, itemsize, {"exp_avg": low, "exp_avg_sq": low})
    project = 2 * drawn + low + (4 * min(short * long, update_tiles.TILE_NUMEL) if itemsize < 4 else 0)
    saving = _saving_bytes(settings, shape, itemsize)
    written = tile + narrow_weight_bytes(settings, shape, itemsize)
    scaling = 17 * long  # norms of R and of N, where R is none, their ratio or 0
    return max(project, moments + 2 * low + scaling, moments + 4 * long + max(saving, written))


def narrow_weight_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of a tile of a weight that is not float32, in float32, its noise and its rounded copy."""
    if itemsize == 4:
        return 0
    return (4 + (6 if settings["rounding"] == "stochastic" else 0)) * tile_of_rows(shape)


def _saving_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Beside the moments, while one of them is rounded to its format."""
    _, long, rank = _sizes(settings, shape)
    return max(
        saving_bytes(each, settings, itemsize, rank * long)
        for name, each in state_values("galore", settings, shape).items()
        if name != "basis"
    )


def _loaded_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of basis and moments in float32."""
    _, long, rank = _sizes(settings, shape)
    low = 4 * rank * long
    moments = _copies(settings, shape, itemsize, {"exp_avg": low, "exp_avg_sq": low})
    return _basis_bytes(settings, shape, itemsize) + moments


def _basis_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of a basis in float32 that is decoded or made."""
    short, _, rank = _sizes(settings, shape)
    basis = 4 * short * rank
    is_made = settings["projection"] == "dct"
    return basis if is_made else _copies(settings, shape, itemsize, {"basis": basis})


def tile_of_rows(shape: Shape) -> int:
    """Values in the rows of a matrix that are worked on at one time."""
    *_, rows, columns = shape
    return min(rows, max(1, update_tiles.TILE_NUMEL // columns)) * columns


def _copies(settings: Settings, shape: Shape, itemsize: int, sizes: dict[str, int]) -> int:
    """Of state that is loaded as float32, `sizes` bytes each; what is float32 already takes none."""
    tensors = state_values("galore", settings, shape)
    return sum(size for name, size in sizes.items() if stored_itemsize(tensors[name], settings, itemsize) < 4)


def refresh_bytes(settings: Settings, shape: Shape, itemsize: int, on_cuda: bool) -> int:
    short, long, rank = _sizes(settings, shape)
    whole, old = 4 * short * long, 4 * short * rank
    basis = StateTensor(short * rank, "basis")
    saved = old + saving_bytes(basis, settings, itemsize, short * rank)
    if settings["projection"] == "dct":
        return _choice_bytes(settings, shape, itemsize, on_cuda)
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


def _choice_bytes(settings: Settings, shape: Shape, itemsize: int, on_cuda: bool) -> int:
    """Of choosing cosine vectors, and of moving the moments of those that stay."""
    short, long, rank = _sizes(settings, shape)
    columns = min(long, max(1, update_tiles.TILE_NUMEL // short))
    tile, spectrum = 4 * short * columns, 8 * (short // 2 + 1) * columns
    transformed = tile + spectrum + (FFT_COPIES * tile if on_cuda else 0)
    if settings.get("on_refresh") != "rotate":
        return transformed
    low = 4 * rank * long
    loaded = _copies(settings, shape, itemsize, {"exp_avg_sq": low})
    return max(transformed, 2 * low + max(loaded, _saving_bytes(settings, shape, itemsize)))


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
