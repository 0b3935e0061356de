"""Group-wise int8 weights, value by value in float64. Imports nothing of lowmem."""

from __future__ import annotations

import torch
from torch import Tensor


def quantized(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales per group) of a matrix: round(w / s), s = max |w| of the group / 127."""
    w = w.double()
    rows, columns = w.shape
    codes = torch.zeros(rows, columns, dtype=torch.float64)
    scales = torch.zeros(rows, -(-columns // group), dtype=torch.float64)
    for i in range(rows):
        for g in range(scales.shape[1]):
            part = w[i, g * group : (g + 1) * group]
            scale = part.abs().max() / 127
            scales[i, g] = scale
            if scale > 0:
                codes[i, g * group : (g + 1) * group] = torch.round(part / scale)
    return codes, scales


def dequantized(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return codes.double() * scales.double().repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def sgd_step(codes: Tensor, scales: Tensor, grad: Tensor, lr: float, decay: float, group: int) -> tuple:
    """Dequantise, step, quantise to nearest."""
    w = dequantized(codes, scales, group)
    return quantized(w - lr * (grad.double() + decay * w), group)
