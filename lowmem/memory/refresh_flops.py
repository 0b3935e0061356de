"""Floating-point operations of fitting a basis to a gradient by subspace iteration. Imports no torch.

For a matrix (m, n) with m <= n, rank r and a width w = min(m, r + 16), with p = 1 iteration from the last basis, and 2
for the first:

    products    p (4 m n w) + 2 m n w + 2 n w^2 + 2 m w r      as the tests count them
    qr          p (4 n w^2 + 4 m w^2 - 8/3 w^3)                by reflections, Q formed: 4 a w^2 - 4/3 w^3 for (a, w)

and an eigendecomposition of (w, w), which is left out. See `lowmem.numerics.linalg.leading_subspace`.
"""

from __future__ import annotations

from lowmem.memory.architecture import Shape
from lowmem.memory.low_rank_formulas import OVERSAMPLE


def product_flops(shape: Shape, rank: int, *, is_first: bool) -> int:
    """Of the matrix products; a multiplication and an addition are two."""
    m, n = min(shape), max(shape)
    w = min(m, rank + OVERSAMPLE)
    return (2 if is_first else 1) * 4 * m * n * w + 2 * m * n * w + 2 * n * w * w + 2 * m * w * rank


def refresh_flops(shape: Shape, rank: int, *, is_first: bool) -> int:
    """Products, and what makes columns orthonormal."""
    m, n = min(shape), max(shape)
    w = min(m, rank + OVERSAMPLE)
    orthonormal = 4 * (m + n) * w * w - 8 * w**3 // 3
    return product_flops(shape, rank, is_first=is_first) + (2 if is_first else 1) * orthonormal
