"""Do all processes hold the same weights? Asked once, of those that data parallel training never sends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.errors import RefusedError

PIECE_BYTES = 1 << 22
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number whose multiples have no pattern, as int64


def refuse_different_weights(tensors: Mapping[str, Tensor]) -> None:
    """Raise RefusedError on every process, naming the first, where `tensors` are not the same bits on all of them."""
    if not tensors:
        return
    mine = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    differs = torch.stack([theirs != everyones[0] for theirs in everyones]).any(0).tolist()
    if names := [name for name, is_wrong in zip(tensors, differs, strict=True) if is_wrong]:
        raise RefusedError(
            f"{len(names)} of {len(tensors)} int8 tensors are not the same on all processes, first {names[0]}. Data "
            "parallel training changes them by the same steps everywhere and does not send them: let every process "
            "load the same folder, or make its model with the same seed."
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """A number, int64, that another content almost surely has not; needs 8 bytes for each of a few million values."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), PIECE_BYTES):
        piece = flat[start : start + PIECE_BYTES].long().add_(1)
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=tensor.device)
        total += piece.mul_(places.mul_(_SPREAD).bitwise_right_shift_(17)).sum()
    return total
