"""Stochastic rounding to bfloat16.

Rounding to nearest loses every update below half a unit of the last place (2^-9 of the value), which
is most of fine-tuning. Rounding up with probability equal to the discarded fraction keeps the
expectation exact: E[round(x)] = x.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 1 << 16


def bf16_stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 `x` to bfloat16, up or down at random, so that the mean is `x`.

    A bfloat16 is the upper half of a float32, so adding 16 random low bits and cutting them off rounds
    away from zero with probability (discarded part) / 2^16. Infinities stay, NaN stays NaN.
    """
    noise = torch.randint(0, _LOW_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = (noise.add_(x.contiguous().view(torch.int32))).bitwise_and_(-_LOW_BITS).view(torch.float32)
    # A NaN's payload plus noise could carry into the sign bit and come out as a number.
    return rounded.masked_fill_(x.isnan(), float("nan")).bfloat16()
