"""Norms of gradients, whole or projected, and clipping by them. Nothing is read from the device here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.numerics.row_gradients import wide_norm

EPS = 1e-6
"""As torch.nn.utils.clip_grad_norm_ adds to a norm before it divides."""


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all entries of all `tensors`, a float32 scalar, or a wider one, on the device of the first."""
    assert tensors, "a norm of nothing"
    norms = [wide_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def is_finite(norm: Tensor) -> bool:
    """Asks the device once; a tensor without contents, in a simulation, is taken for finite."""
    return isinstance(norm, FakeTensor) or norm.is_meta or bool(torch.isfinite(norm))


def clip_to_(tensors: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale `tensors` so that a 2-norm that is `norm` becomes at most `max_norm`."""
    factor = torch.clamp(max_norm / (norm + EPS), max=1.0)
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.device))


def clip_each_(tensor: Tensor, max_norm: float, numel: int, total_numel: int) -> None:
    """Clip one gradient by itself, to its share of `max_norm`: to a root mean square of max_norm / sqrt(total).

    `numel` are the entries of the parameter, of `total_numel` that are trained. When every gradient is clipped
    so, the norm of all is at most `max_norm`, and none has to wait for another.
    """
    clip_to_([tensor], wide_norm(tensor), max_norm * math.sqrt(numel / total_numel))
