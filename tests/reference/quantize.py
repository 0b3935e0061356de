"""Low-bit state, value by value in float64. Imports nothing of lowmem."""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTS = torch.tensor([(c / 127) ** 2 for c in range(128)], dtype=torch.float64)
VARIANCES = torch.tensor([(c / 255) ** 4 for c in range(256)], dtype=torch.float64)


def neighbours(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of each |value|: the nearest level at or below it and the one above, times the largest magnitude of its block."""
    below, above = torch.zeros_like(values.double()), torch.zeros_like(values.double())
    for start in range(0, values.numel(), block):
        part = values[start : start + block].double().abs()
        grid = levels * part.max()
        index = torch.searchsorted(grid, part, right=True).sub(1).clamp(0, len(levels) - 2)
        below[start : start + block], above[start : start + block] = grid[index], grid[index + 1]
    return below, above


def nearest(values: Tensor, levels: Tensor, block: int, *, positive_stays: bool = False) -> Tensor:
    """Each value as the nearest level with its sign; with `positive_stays` none that is positive becomes 0."""
    below, above = neighbours(values, levels, block)
    magnitude = values.double().abs()
    chosen = torch.where(magnitude - below > above - magnitude, above, below)
    if positive_stays:
        chosen = torch.where((values > 0) & (chosen == 0), above, chosen)
    return chosen * values.sign()


def four_bits(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(values to nearest on 16 equal steps that hold 0 and reach over each group, the steps)."""
    out, steps = torch.zeros_like(values.double()), torch.zeros_like(values.double())
    for start in range(0, values.numel(), group):
        part = values[start : start + group].double()
        step = (part.max().clamp(min=0) - part.min().clamp(max=0)) / 15
        steps[start : start + group] = step
        if step > 0:
            zero = torch.round(-part.min().clamp(max=0) / step)
            out[start : start + group] = (torch.round(part / step + zero).clamp(0, 15) - zero) * step
    return out, steps


def decades(signed: bool) -> Tensor:
    """The codes of 8-bit Adam, arXiv:2110.02861: decades, each cut into half as many steps as the one above."""
    levels = [0.0]
    for decade in range(6, -1, -1):
        steps = (64 if signed else 128) >> decade
        levels += [10.0**-decade * (0.1 + 0.9 * k / steps) for k in range(1, steps + 1)]
    return torch.tensor(levels, dtype=torch.float64)
