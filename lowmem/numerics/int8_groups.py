"""Matrices as int8 codes with one scale for every group of values of a row.

    w = scale * code        code in -127 .. 127, a group being `group` neighbours of a row; the last may be shorter

Zero is always a code. A scale is max |w| / 127 of its group, made anew at each update: a scale that moves by little
moves few codes, and with stochastic rounding the values keep their expectation.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = 127


def groups_in(columns: int, group: int) -> int:
    """How many groups a row of `columns` values has."""
    return -(-columns // group)


def quantize_rows(
    wide: Tensor,  # (rows, columns)  float32, overwritten
    group: int,
    scale_dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # (rows, columns) int8, (rows, groups)
    """Codes with the finest scales that hold every value; stochastic with a generator, else to nearest."""
    scales = _as_stored(largest_magnitudes(wide, group) / LARGEST_CODE, scale_dtype)
    return _codes(wide, scales, group, generator), scales


def dequantize_rows(
    codes: Tensor,  # (rows, columns)  int8
    scales: Tensor,  # (rows, groups)
    group: int,
) -> Tensor:  # (rows, columns)  float32
    """scale * code, in float32."""
    wide = codes.float()
    for values, each in _grouped(wide, scales.float(), group):
        values.mul_(each)
    return wide


def largest_magnitudes(
    wide: Tensor,  # (rows, columns)
    group: int,
) -> Tensor:  # (rows, groups)
    """max |w| of every group. NaN where the group holds a NaN."""
    rows, columns = wide.shape
    peaks = torch.empty(rows, groups_in(columns, group), device=wide.device, dtype=torch.float32)
    for values, each in _grouped(wide, peaks, group):
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        each.copy_(torch.maximum(low.abs(), high.abs()))
    return peaks


def _codes(wide: Tensor, scales: Tensor, group: int, generator: torch.Generator | None) -> Tensor:
    """Overwrites `wide`. A group of zeros has scale 0 and codes 0."""
    divisors = scales.float()
    divisors = torch.where(divisors == 0, torch.ones_like(divisors), divisors)
    for values, each in _grouped(wide, divisors, group):
        values.div_(each)
    if generator is None:
        wide.round_()
    else:
        # In float32 a step of 0.02 of a code is exact enough to be rounded without bias; in bfloat16 it is not.
        wide.add_(
            torch.rand(wide.shape, device=wide.device, dtype=torch.float32, generator=generator)
        ).floor_()
    return wide.clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def _grouped(matrix: Tensor, per_group: Tensor, group: int):
    """(values (rows, groups, group), per group (rows, groups, 1)): the full groups, then the shorter last ones."""
    rows, columns = matrix.shape
    full = columns // group
    if full:
        yield matrix[:, : full * group].view(rows, full, group), per_group[:, :full].unsqueeze(-1)
    if columns > full * group:
        yield matrix[:, full * group :].unsqueeze(1), per_group[:, full:].unsqueeze(-1)


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, never smaller than asked for: a code of more than 127 would be cut off."""
    if dtype == torch.float32:
        return scales
    return (scales * (1 + torch.finfo(dtype).eps)).to(dtype)
