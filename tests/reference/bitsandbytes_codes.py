"""8-bit Adam's and Lion's codes, arXiv:2110.02861, value by value in float64, as bitsandbytes orders its 256 levels."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def levels(*, signed: bool) -> Tensor:
    """0, 1, and seven decades of middles of equal steps, in which a decade has twice as many as the one below."""
    found = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        for k in range(steps):
            middle = 10.0 ** (decade - 6) * (0.1 + 0.9 * (k + 0.5) / steps)
            found += [middle, -middle] if signed else [middle]
    return torch.tensor(sorted(found), dtype=torch.float64)


def decoded(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The values that codes stand for, flat."""
    flat = levels(signed=signed)[codes.reshape(-1).long()]
    return flat * scales.double().repeat_interleave(BLOCK)[: flat.numel()]


def scales_of(values: Tensor) -> Tensor:
    """The largest magnitude of each block."""
    return torch.stack([block.abs().max() for block in values.reshape(-1).double().split(BLOCK)])


def excess(codes: Tensor, values: Tensor, *, signed: bool) -> Tensor:
    """By how much each code is farther from its value than the nearest one, in shares of the scale."""
    grid, flat = levels(signed=signed), values.reshape(-1).double()
    shares = flat / scales_of(flat).repeat_interleave(BLOCK)[: flat.numel()]
    chosen = (grid[codes.reshape(-1).long()] - shares).abs()
    return chosen - (shares.unsqueeze(-1) - grid).abs().min(1).values
