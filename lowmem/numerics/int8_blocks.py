"""State as 8-bit codes with one float32 scale for every 256 values in the order of memory.

    signed codes (int8)       x = scale * sign(c) (c / 127)^2        moments, bases
    unsigned codes (uint8)    x = scale * (c / 255)^4                second moments, which are never negative

`scale` is the largest magnitude of its block; the last block may be shorter. 1 + 4 / 256 bytes a value.

Why powers: Adam divides the first moment by the root of the second, so small values beside large ones in a block
must stay apart. Equal steps lose them. The tree of decades of 8-bit Adam (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", arXiv:2110.02861) keeps them, but its steps grow tenfold at the lower end of a decade, and it
takes a search through a table. A square and a fourth power follow Adam in float more closely than either, which
`tests/optim/test_adam_8bit.py` holds, and need only roots. The exponent of second moments is twice the other's:
their roots reach as far down as first moments do.

A positive second moment is never 0 as a code: it would make the smallest gradients of a block the largest steps.
A block that holds an infinity or a NaN is NaN when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.numerics import tiles

BLOCK = 256
"""Values that share a scale."""


class _Map(NamedTuple):
    """Codes 0 .. largest stand for (code / largest) ^ (2 ^ squarings)."""

    largest: int
    squarings: int


_MAPS = {torch.int8: _Map(127, 1), torch.uint8: _Map(255, 2)}


def blocks_in(numel: int) -> int:
    """How many blocks, and so scales, `numel` values have."""
    return -(-numel // BLOCK)


def quantize_blocks_(
    values: Tensor,  # (n)  float32
    codes: Tensor,  # (n)  int8, or uint8 for values that are not negative
    scales: Tensor,  # (blocks_in(n))  float32
    generator: torch.Generator | None,
) -> None:
    """Write codes and scales of `values`.

    Each value takes the nearer of the two codes around it; with a generator either, at random, so that the mean
    is the value.
    """
    for wide, code, scale in _blocks(values, codes, scales):
        _quantize_(wide, code, scale, generator)


def dequantize_blocks(
    codes: Tensor,  # (n)
    scales: Tensor,  # (blocks_in(n))
) -> Tensor:  # (n)  float32
    """The values that the codes stand for."""
    largest, squarings = _MAPS[codes.dtype]
    values = torch.empty(codes.shape, device=codes.device, dtype=torch.float32)
    for wide, code, scale in _blocks(values, codes, scales):
        wide.copy_(code).div_(largest)
        if codes.dtype == torch.int8:
            wide.mul_(wide.abs())
        else:
            for _ in range(squarings):
                wide.square_()
        wide.mul_(scale)
    return values


def _quantize_(
    wide: Tensor,  # (b, 256)
    code: Tensor,  # (b, 256)
    scale: Tensor,  # (b, 1)
    generator: torch.Generator | None,
) -> None:
    peak = torch.amax(wide.abs(), dim=1, keepdim=True)
    scale.copy_(peak)
    share = wide / torch.where(peak == 0, torch.ones_like(peak), peak)
    magnitude = _codes(share, _MAPS[code.dtype], generator)
    if code.dtype == torch.uint8:
        code.copy_(magnitude.maximum(wide > 0))
    else:
        code.copy_(magnitude.copysign_(share))


def _codes(share: Tensor, to: _Map, generator: torch.Generator | None) -> Tensor:
    """Codes of |share| <= 1 as float32."""
    power = 1 << to.squarings
    magnitude = share.abs()
    below = magnitude.clone()
    for _ in range(to.squarings):
        below.sqrt_()
    below.mul_(to.largest).floor_()
    low, gap = below.clone(), below + 1
    for _ in range(to.squarings):
        low.square_(), gap.square_()
    gap.sub_(low)
    excess = magnitude.mul_(float(to.largest) ** power).sub_(low)
    return below.add_(excess > gap.mul_(0.5 if generator is None else _uniform(share, generator)))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in (0, 1) in steps of 2^-16: four from each draw of 64 bits, which is what costs time."""
    draws = torch.empty(-(-like.numel() // 4), device=like.device, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    noise = draws.view(torch.int16)[: like.numel()].float()
    return noise.add_(2**15 + 0.5).mul_(2.0**-16).view(like.shape)


def _blocks(values: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(values (b, 256), codes (b, 256), scales (b, 1)) of some full blocks at a time, then of the shorter last."""
    full = values.numel() // BLOCK * BLOCK
    for start in range(0, full, tiles.CODED_NUMEL):
        part = slice(start, min(start + tiles.CODED_NUMEL, full))
        scale = scales[part.start // BLOCK : part.stop // BLOCK]
        yield values[part].view(-1, BLOCK), codes[part].view(-1, BLOCK), scale.unsqueeze(1)
    if values.numel() > full:
        yield values[full:].unsqueeze(0), codes[full:].unsqueeze(0), scales[full // BLOCK :].unsqueeze(1)
