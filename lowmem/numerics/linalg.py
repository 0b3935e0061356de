"""Subspaces of a gradient: exact, randomised, warm-started, always with canonical signs."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.tiles import largest_magnitude, matmul_fp32, matmul_transposed_fp32


def canonical_signs(P: Tensor) -> Tensor:
    """Flip columns of P (m, r) so that the entry of largest magnitude of each is positive.

    Singular vectors are defined up to sign, and libraries choose differently. Moments kept across a
    refresh live in the basis' signs, so a run would otherwise depend on the library and the device.
    """
    largest = P.gather(-2, P.abs().argmax(dim=-2, keepdim=True))
    return P * torch.where(largest < 0, -1.0, 1.0)


def top_singular_vectors(
    G: Tensor,  # (m, n)  m <= n
    rank: int,
) -> Tensor:  # (m, rank)
    """The `rank` leading left singular vectors of G, from a full SVD in float32.

    Costs O(m^2 n) time and the float32 factors as workspace; `leading_subspace` is the cheap way.
    """
    U = torch.linalg.svd(G.float(), full_matrices=False).U
    # A slice would keep all of U alive in the optimizer state.
    return canonical_signs(U[:, :rank].clone())


def leading_subspace(
    G: Tensor,  # (m, n)  m <= n
    rank: int,
    *,
    start: Tensor | None,  # (m, rank)  the previous basis, or None
    generator: torch.Generator,
    oversample: int = 16,
    power_iterations: int = 1,
) -> Tensor:  # (m, rank)
    """Nearly the `rank` leading left singular vectors of G, by randomised block power iteration.

        S <- [start, Gaussian(m, oversample)]   or   Gaussian(m, rank + oversample)
        repeat:  S <- qr(G qr(G^T S))            once when warm, `power_iterations` + 1 times when cold
        B <- S^T G;  P <- S (leading eigenvectors of B B^T)

    Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv:0909.4061, algorithms 4.4
    and 5.1. G is scaled by its largest entry first, so gradients of 1e-22 do not underflow.
    """
    m = G.shape[0]
    width = min(m, rank + oversample)
    fresh = width if start is None else width - rank
    S = torch.randn(m, fresh, device=G.device, dtype=torch.float32, generator=generator)
    if start is not None:
        S = torch.cat([start, S], dim=1)
    scale = 1.0 / largest_magnitude(G).float()
    for _ in range(1 if start is not None else 1 + power_iterations):
        S = _orthonormal(matmul_transposed_fp32(G, S).mT * scale)  # (n, width)
        S = _orthonormal(matmul_fp32(G, S) * scale)  # (m, width)
    B = matmul_transposed_fp32(G, S) * scale  # (width, n)
    _, V = torch.linalg.eigh(B @ B.mT)
    return canonical_signs(S @ V.flip(-1)[:, :rank])


def _orthonormal(Y: Tensor) -> Tensor:
    return torch.linalg.qr(Y).Q
