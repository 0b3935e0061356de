"""Bases as 4-bit codes, two in a byte, with a scale and a zero for every 128 values in the order of memory.

    x = scale * (code - zero)        code and zero in 0 .. 15, scale in bfloat16

0.5 + 3 / 128 = 0.523 bytes a value. 0 is always a code's value, so zeros stay zero, and a group reaches from its
smallest to its largest value, both taken to include 0. The last group may be shorter.

Equal steps over the whole range are near the best that 16 codes can do for an orthonormal basis, whose entries are
spread like a normal distribution. A range cut by a twentieth would lower their error a little, but would shorten
the vectors of a basis that has few large entries, so nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem.numerics import tiles

GROUP = 128
"""Values that share a scale and a zero."""
LARGEST_CODE = 15


def groups_in(numel: int) -> int:
    """How many groups `numel` values have."""
    return -(-numel // GROUP)


def bytes_for(numel: int) -> int:
    """Bytes of the codes of `numel` values."""
    return -(-numel // 2)


def quantize_groups_(
    values: Tensor,  # (n)  float32
    packed: Tensor,  # (bytes_for(n))  uint8
    scales: Tensor,  # (groups_in(n))  bfloat16
    zeros: Tensor,  # (groups_in(n))  uint8
) -> None:
    """Write packed codes, scales and zeros of `values`, each value to the nearest code."""
    for wide, codes, scale, zero in _groups(values, packed, scales, zeros):
        _quantize_(wide, codes, scale, zero)


def dequantize_groups(
    packed: Tensor,  # (bytes_for(n))
    scales: Tensor,  # (groups_in(n))
    zeros: Tensor,  # (groups_in(n))
    numel: int,
) -> Tensor:  # (n)  float32
    """The `numel` values that the codes stand for."""
    values = torch.empty(numel, device=packed.device, dtype=torch.float32)
    for wide, codes, scale, zero in _groups(values, packed, scales, zeros):
        wide.copy_(unpack(codes, wide.numel()).view(wide.shape)).sub_(zero).mul_(scale)
    return values


def _quantize_(
    wide: Tensor,  # (g, 128)
    codes: Tensor,  # (g * 64)
    scale: Tensor,  # (g, 1)
    zero: Tensor,  # (g, 1)
) -> None:
    low = wide.amin(dim=1, keepdim=True).clamp_(max=0)
    high = wide.amax(dim=1, keepdim=True).clamp_(min=0)
    # In parts, as the range of a huge group is beyond float32.
    scale.copy_(_rounded_up(high / LARGEST_CODE - low / LARGEST_CODE))
    step = torch.where(scale == 0, 1.0, scale.float())
    offset = (-low / step).round_().clamp_(0, LARGEST_CODE)
    zero.copy_(offset)
    code = (wide / step).add_(offset).round_().clamp_(0, LARGEST_CODE)
    codes.copy_(pack(code.to(torch.uint8).view(-1)))


def pack(codes: Tensor) -> Tensor:
    """Two codes of 0 .. 15 (uint8) in a byte, the first in its lower half; an odd last one stands alone."""
    packed = codes[0::2].clone()
    packed[: codes.numel() // 2] += codes[1::2] << 4
    return packed


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The `numel` codes that `pack` put into `packed`."""
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:numel]


def _rounded_up(scales: Tensor) -> Tensor:
    """As bfloat16, not smaller than asked for: a group must not be cut off at its ends."""
    return (scales * (1 + torch.finfo(torch.bfloat16).eps / 2)).bfloat16()


def _groups(
    values: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(values (g, 128), their bytes, scales (g, 1), zeros (g, 1)) of some full groups, then of the shorter last."""
    full = values.numel() // GROUP * GROUP
    for start in range(0, full, tiles.CODED_NUMEL):
        stop = min(start + tiles.CODED_NUMEL, full)
        groups = slice(start // GROUP, stop // GROUP)
        wide = values[start:stop].view(-1, GROUP)
        yield wide, packed[start // 2 : stop // 2], scales[groups].unsqueeze(1), zeros[groups].unsqueeze(1)
    if values.numel() > full:
        last = slice(full // GROUP, None)
        yield (
            values[full:].unsqueeze(0),
            packed[full // 2 :],
            scales[last].unsqueeze(1),
            zeros[last].unsqueeze(1),
        )
