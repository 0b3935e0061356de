"""What the update of a matrix (m, n) holds that is whitened (swan, muon). Imports no torch.

k is the smaller side; a tile is as many rows as hold 2^21 values, t in all, a strip as many rows of (k, k), s in all;
a slab of a wide or square matrix is rows of k^2 values, or a tile if that is more, of a tall one a tile; in bytes:

    vectors      swan: 12 m, through the whole update of a matrix
    running mean muon: what goes into it and the mean, if not float32, 4 t each; the rounding to its format
    a tile of X  a bfloat16 gradient 4 t, a mean that is not float32 4 t, what both make 4 t, the tile 4 t
    Gram matrix  4 k^2, a slab, and a tile where m <= n
    iterations   three matrices, 12 k^2, and a strip 4 s; swan keeps the Gram matrix, 4 k^2, to measure its step. nsds
                 needs two in all. eigh works in float64 and with four, and five on CUDA
    write back   Z 4 k^2, a slab of the direction, and a tile of X, or the weight 4 t, its noise 4 t, its copy 2 t

The matrices of a batch are whitened one after the other.
"""

from __future__ import annotations

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.state_formulas import INT8_BLOCK, state_values, storage_format, stored_itemsize
from lowmem.memory.state_tensors import Settings, StateTensor
from lowmem.memory.update_tiles import saving_bytes

WHITENED = frozenset({"swan", "muon"})
"""Optimizers of which `whitened_bytes` knows what a matrix takes."""

EIGH_COPIES = 3
"""Workspace on CUDA, as `lowmem.memory.workspaces` states it."""


def whitened_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Temporaries at the fullest moment of updating a matrix or a batch of matrices."""
    *_, m, n = shape
    k, t = min(m, n), _rows_in_a_tile(m, n) * n
    strip = _rows_in_a_tile(k, k) * k
    narrow = 4 if itemsize < 4 else 0
    moment = state_values(algorithm, settings, shape).get("momentum_buffer")
    loaded = 4 if moment is not None and stored_itemsize(moment, settings, itemsize) < 4 else 0
    decoded = 4 * min(t, update_tiles.CODED_NUMEL) if _is_int8(moment, settings) else 0
    averaged = 0
    if moment is not None:
        saving = saving_bytes(moment, settings, itemsize, t)
        if _is_int8(moment, settings) and t < m * n and t % INT8_BLOCK:
            saving += 4 * t
        averaged = loaded * t + max(narrow * t, saving, decoded)
    tile = _tile_bytes(settings, t, narrow, loaded, decoded, has_mean=moment is not None)
    value = 8 if settings["whitening"] == "eigh" else 4
    slab = max(t, m * m // n * n) if m <= n else t
    as_value = (4 + value) * t if value == 8 else 0
    gram = value * k * k + (value * slab if m <= n else 0) + max(tile, as_value)
    whitened = _root_bytes(algorithm, settings, k, strip, on_cuda=on_cuda)
    weight = (narrow + (6 if narrow and settings["rounding"] == "stochastic" else 0)) * t
    # Of a wide matrix tiles are added into the rows of the direction, of a tall one a tile makes its own.
    making = 4 * slab + tile if m <= n else max(tile, 8 * t)
    written = 4 * k * k + max(making, 4 * slab + weight)
    vectors = 12 * m if settings.get("standardize") else 0
    return max(averaged, vectors + max(tile, gram, whitened, written))


def _root_bytes(algorithm: str, settings: Settings, k: int, strip: int, *, on_cuda: bool) -> int:
    """The Gram matrix included."""
    kept = 1 if algorithm == "swan" else 0
    if settings["whitening"] == "eigh":
        return 8 * k * k * (kept + max(4, 2 + EIGH_COPIES if on_cuda else 0))
    if settings["whitening"] == "nsds":
        return 4 * k * k * (1 + kept) + 4 * strip * kept
    return 4 * k * k * (3 + kept) + 4 * strip


def _tile_bytes(settings: Settings, t: int, narrow: int, loaded: int, decoded: int, *, has_mean: bool) -> int:
    """Of making a tile of X, itself included."""
    if not has_mean:
        return (narrow + 4) * t
    if settings["nesterov"]:
        return max((narrow + loaded + 4) * t, (narrow + loaded) * t + decoded, 8 * t)
    return max((loaded + 4) * t, loaded * t + decoded)


def _rows_in_a_tile(rows: int, columns: int) -> int:
    return min(rows, max(1, update_tiles.TILE_NUMEL // columns))


def _is_int8(moment: StateTensor | None, settings: Settings) -> bool:
    return moment is not None and storage_format(moment, settings) == "int8"
