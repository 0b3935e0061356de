"""What a strategy holds beside weights, gradients and state while it trains, at most, in bytes. Imports no torch.

Read in the versions that `divided_tensors` names, with the settings of recipes/accelerate, and not measured. A value
takes b bytes:

ddp      buckets of all gradients that its reducer has, b, always (`gradient_as_bucket_view` is off)
fsdp2    in forward and backward: the last unit (last norm and head) whole; of the largest unit (a layer, or embedding)
         the weights of two, since the next is gathered meanwhile, and the buffer of an all-gather; in backward its
         gradients and the buffer of a reduce-scatter
zero1    a bucket of 500,000,000 values, b, from the first gradient on; when it is reduced a copy of what is in it
zero2    the same, in backward
zero3    such a bucket, b, always, and in backward a copy of what is in it; weights that are gathered, up to
         1,000,000,000 values (`stage3_max_live_parameters`), b
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.memory.architecture import Architecture, Parameter
from lowmem.memory.divided_pieces import Strategy

BUCKET_NUMEL = 500_000_000
LIVE_NUMEL = 1_000_000_000

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Buffers:
    """By what they are, in bytes."""

    in_backward: dict[str, int]
    in_reduction: dict[str, int]
    """After backward, where gradients are reduced only then."""
    in_step: dict[str, int]


def buffers(strategy: Strategy, architecture: Architecture, itemsize: int) -> Buffers:
    """Of a strategy that divides. Every parameter is trained."""
    if strategy == "fsdp2":
        return Buffers(_of_units(architecture, itemsize), {}, {})
    bucket = {"bucket of gradients": itemsize * BUCKET_NUMEL}
    copy = {"what of it is reduced": itemsize * min(BUCKET_NUMEL, architecture.num_parameters)}
    if strategy == "zero1":
        return Buffers(bucket, bucket | copy, {})
    if strategy == "zero2":
        return Buffers(bucket | copy, {}, {})
    gathered = {"gathered weights": itemsize * min(LIVE_NUMEL, architecture.num_parameters)}
    return Buffers(bucket | copy | gathered, {}, bucket)


def tail_numel(architecture: Architecture) -> int:
    """Values of FSDP2's last unit, which Accelerate makes of last norm and head, or of the embedding tied to it."""
    names = {LAST_NORM, EMBEDDING if architecture.is_tied else HEAD}
    return sum(each.numel for each in architecture.parameters if each.name in names)


def reduced_by_ddp(trained: Sequence[Parameter], leaving: Sequence[Parameter], itemsize: int) -> int:
    """Bytes of the buckets of DDP's reducer; where all leave it, it keeps the smallest."""
    left = sum(each.numel for each in trained) - sum(each.numel for each in leaving)
    return itemsize * (left or min(each.numel for each in trained))


def _of_units(architecture: Architecture, itemsize: int) -> dict[str, int]:
    layers: Counter[int | None] = Counter()
    for each in architecture.parameters:
        layers[each.layer] += each.numel
    del layers[None]
    units = [*layers.values(), 0 if architecture.is_tied else _numel_of(architecture, EMBEDDING)]
    largest, tail = max(units), tail_numel(architecture)
    return {
        "gathered weights of head and last norm": itemsize * tail,
        "gathered weights of two units": itemsize * 2 * largest,
        "all-gather of a unit": itemsize * largest,
        "gradients of a unit": itemsize * max(largest, tail),
        "reduce-scatter of a unit": itemsize * max(largest, tail),
    }


def _numel_of(architecture: Architecture, name: str) -> int:
    return next(each.numel for each in architecture.parameters if each.name == name)
