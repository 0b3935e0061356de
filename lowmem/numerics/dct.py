"""The orthonormal cosine basis (DCT-II) of the columns of a matrix: its vectors one by one, and its energies.

Vector k of length m has the entries

    c_k cos(pi k (2 j + 1) / (2 m))    j = 0 .. m - 1,   c_0 = sqrt(1 / m), else sqrt(2 / m)

so any of them can be made when it is needed, and the m x m matrix of all never is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowmem.numerics import tiles


def cosine_vectors(
    numbers: Tensor,  # (..., r)  which vectors, whole numbers in any dtype
    length: int,
) -> Tensor:  # (..., m, r)  float32
    """The vectors with these numbers, as columns.

    Angles are reduced in whole numbers: k (2 j + 1) is large, and float32 would not tell the angle from it.
    """
    k = numbers.to(torch.int64).unsqueeze(-2)
    places = torch.arange(1, 2 * length, 2, device=numbers.device).unsqueeze(-1)
    angles = (places * k).remainder_(4 * length).to(torch.float32).mul_(math.pi / (2 * length))
    norms = torch.where(k == 0, math.sqrt(1 / length), math.sqrt(2 / length)).to(torch.float32)
    return angles.cos_().mul_(norms)


def cosine_energies(
    G: Tensor,  # (m, n)  any float dtype
    scale: Tensor,  # ()  what to multiply G with, so that its squares are float32 numbers
) -> Tensor:  # (m,)  float32
    """|v_k^T G|^2 for each vector v_k, from a fast Fourier transform of some columns at a time.

    Source: Makhoul, "A fast cosine transform in one and two dimensions", 1980: entries with even numbers, then those
    with odd ones backwards; transform k is turned by -pi k / (2 m), and its parts are the coefficients k and m - k.
    """
    m, n = G.shape
    along = 0 if G.stride(1) <= G.stride(0) else 1  # transforms stay as they lie in memory
    lying = G if along == 0 else G.mT
    half = torch.arange(m // 2 + 1, device=G.device)
    turns = torch.polar(torch.ones_like(half, dtype=torch.float32), half * (-math.pi / (2 * m)))
    energies = torch.zeros(m, device=G.device, dtype=torch.float32)
    step = max(1, tiles.TILE_NUMEL // m)
    for start in range(0, n, step):
        block = lying.narrow(1 - along, start, min(step, n - start))
        spectrum = torch.fft.rfft(_evens_then_odds(block, along).float().mul_(scale), dim=along)
        spectrum.mul_(turns.unsqueeze(1 - along))
        parts = torch.linalg.vector_norm(torch.view_as_real(spectrum), dim=1 - along).square_()
        del spectrum
        energies[: m // 2 + 1] += parts[:, 0]
        energies[m // 2 + 1 :] += parts[1 : (m + 1) // 2, 1].flip(0)
    energies[0] /= 2
    return energies.mul_(2 / m)


def _evens_then_odds(x: Tensor, dim: int) -> Tensor:
    """A copy with the entries with even numbers first, then the others backwards."""
    if dim == 0:
        return torch.cat([x[::2], x[1::2].flip(0)])
    return torch.cat([x[:, ::2], x[:, 1::2].flip(1)], dim=1)
