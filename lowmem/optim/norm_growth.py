"""Keep the size of a direction from growing faster than a step allows."""

from __future__ import annotations

import torch
from torch import Tensor


def limited_growth(
    norm: Tensor,  # (k,)  of k directions
    before: Tensor,  # (k,)  what `remembered` was after the step before, 0 at first
    growth: float,
) -> tuple[Tensor, Tensor]:
    """(factors, remembered): what to multiply each direction with, and its norm after that.

        factor <- growth before / norm    where that is below 1 and there was a norm before, else 1

    No value is read from the device. A direction of zeros, or one that is not finite, is forgotten: remembering a
    norm of 0 would hold the next one near 0 for a thousand steps.

    Source: Chen et al., "Fira", arXiv:2410.01623, norm-growth limiter.
    """
    allowed = before * growth
    factors = torch.where((before > 0) & (norm > allowed), allowed / norm, torch.ones_like(norm))
    counts = torch.isfinite(norm) & (norm > 0)
    return factors, torch.where(counts, norm * factors, before)
