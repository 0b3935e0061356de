"""Inverse square roots of Gram matrices, by which a matrix is whitened: Z = A^(-1/2), so that Z X has X's singular
vectors and singular values of one size.

Everything happens on the Gram matrix A = X X^T (k, k) of the smaller side, in float32. It is divided by its norm
first, since the iterations diverge on eigenvalues of 3 and more, and Z makes up for that.

    method          products of k^3   matrices held   singular values of Z X over their median
    newton_schulz   3 an iteration    3               0.9 to 1.1
    quintic         4 an iteration    3               about 0.7 to 1.3, wider where X is nearly singular
    nsds            none              1               large ones shortened, at most 2.4 times more than small ones
    eigh            LAPACK's          4, in float64   1

The Gram matrix squares what it is made of: singular values below a thousandth of X's norm drown in its float32 rounding
and keep some of their size. One of zero stays zero, and a matrix of zeros gives finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lowmem.numerics.gram import multiply_

Method = Literal["newton_schulz", "quintic", "nsds", "eigh"]

BETA, NSDS_BETA = 0.8, 0.4
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz_(A: Tensor, iterations: int = 10) -> Tensor:  # (k, k)
    """Coupled Newton-Schulz iteration, the second line with the first one's new value.

        Y <- beta Y (3 I - Z Y)         Y = A / |A|, Z = I at first
        Z <- beta (3 I - Z Y) Z

    Singular values meet at sqrt(3 - 1 / beta). All matrices are polynomials of A and commute, so the product
    M = Z Y is iterated instead of Y, which takes three products instead of four:

        N <- beta (3 M - M^2);    Z <- beta (3 I - N) Z;    M <- beta (3 N - N^2)

    A Z made from the old Y does not settle with this beta: its singular values jump between 0.45 and 1.3.
    """
    norm = _or_one(torch.linalg.vector_norm(A))
    M = _positive_(A.div_(norm))
    N, Z = torch.empty_like(M), torch.eye(len(A), device=A.device, dtype=A.dtype)
    for _ in range(iterations):
        torch.addmm(M, M, M, beta=3 * BETA, alpha=-BETA, out=N)
        multiply_(Z, N, times=-BETA, keep=3 * BETA)
        torch.addmm(N, N, N, beta=3 * BETA, alpha=-BETA, out=M)
    return Z.div_(norm.sqrt())


def quintic_(A: Tensor, iterations: int = 5) -> Tensor:  # (k, k)
    """Muon's polynomial, steepest at zero, on the Gram matrix instead of on X.

        P <- a I + b M + c M^2          M = A / trace(A), Z = I at first
        Z <- P Z;    M <- P M P

    The X of X <- P X is Z X, and M its Gram matrix. In float32 both ways agree; in bfloat16 only that on X is sound.
    """
    a, b, c = QUINTIC
    trace = _or_one(A.diagonal().sum())
    M = _positive_(A.div_(trace))
    P, Z = torch.empty_like(M), torch.eye(len(A), device=A.device, dtype=A.dtype)
    for iteration in range(iterations):
        torch.addmm(M, M, M, beta=b, alpha=c, out=P)
        P.diagonal().add_(a)
        multiply_(Z, P)
        if iteration < iterations - 1:
            multiply_(M, P)
            multiply_(M, P)
    return Z.div_(trace.sqrt())


def nsds_(A: Tensor, iterations: int = 2) -> Tensor:  # (k, k)
    """Newton-Schulz with diagonals in place of matrices ("diagonal substitution"), which takes no product.

        Y <- beta Y Diag(3 - diag(Z) diag(Y))         Y = A / |A|, Z = I at first
        Z <- beta (3 I - Diag(Z) Y) Diag(Z)

    Only the diagonal of Z is needed before the last iteration.
    """
    norm = _or_one(torch.linalg.vector_norm(A))
    Y = A.div_(norm)
    z = torch.ones(len(A), device=A.device, dtype=A.dtype)
    before = z
    for _ in range(iterations):
        Y.mul_((3 - z * Y.diagonal()).mul_(NSDS_BETA))
        before, z = z, NSDS_BETA * (3 * z - z * Y.diagonal() * z)
    Z = Y.mul_(before).mul_(before.unsqueeze(1)).mul_(-NSDS_BETA)
    Z.diagonal().add_(before, alpha=3 * NSDS_BETA)
    return Z.div_(norm.sqrt())


def eigh(A: Tensor, iterations: int = 1) -> Tensor:  # (k, k)
    """From the eigenvalues, in float64. Directions below the rounding of a float32 X become zero."""
    values, vectors = torch.linalg.eigh(A.double())
    floor = values[-1] * (len(A) * torch.finfo(torch.float32).eps ** 2)
    inverse = torch.where(values > floor, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    return (vectors * inverse) @ vectors.mT


METHODS: dict[str, Callable[..., Tensor]] = {
    "newton_schulz": newton_schulz_,
    "quintic": quintic_,
    "nsds": nsds_,
    "eigh": eigh,
}


def inverse_root_(A: Tensor, method: Method, iterations: int | None = None) -> Tensor:  # (k, k)
    """A^(-1/2) by `method`, in A's dtype or, with eigh, float64; `iterations` of None are the method's own.

    A's memory is used for the iterations.
    """
    return METHODS[method](A) if iterations is None else METHODS[method](A, iterations)


def _positive_(M: Tensor) -> Tensor:
    """M + r I, in place, with r four times the rounding of numbers near 1.

    Where X has no rank, the eigenvalues of M are rounding errors and half of them negative. An iteration makes
    them grow like any others, and negative ones without end.
    """
    M.diagonal().add_(4 * torch.finfo(M.dtype).eps)
    return M


def _or_one(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm))
