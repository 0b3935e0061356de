"""Weights and gradients of each of W processes that divide a model, in bytes. Imports no torch.

Read in PyTorch 2.13 (`fully_shard`: _fsdp_param.py, _fsdp_param_group.py), Accelerate 1.15 (`fsdp2_prepare_model`,
`no_sync`) and DeepSpeed 0.19.8 (runtime/zero: stage_1_and_2.py, stage3.py, parameter_offload.py), with the settings of
recipes/accelerate; the tests count the tensors of real processes. Values of the model take b bytes each.

          weights                                            gradients when the optimizer steps
fsdp2     each parameter's largest chunk of rows, b          the same
zero1, 2  all, b, and a process' part of them, 4             those of every parameter that begins or lies in its part,
                                                             whole, b, and a group's part at a time, 4
zero3     its parts, b, and these again, 4; parameters of    its parts, b, and a sub-group's at a time, 4
          at most 100,000 values whole, b

Backward holds more under zero1: every gradient whole, since they are reduced after it; and under zero2 with several
micro-batches: the sum so far and what is new. Under fsdp2 it would hold every gradient whole until the last one, if
recipes did not have each micro-batch reduced (`sync_each_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.memory.architecture import Parameter
from lowmem.memory.divided_pieces import Division, Shown, Strategy, flat_share, padded_rows
from lowmem.memory.ledger import rounded

PERSISTENT_NUMEL = 100_000
"""ZeRO-3 keeps parameters of at most so many values whole once they were gathered (`param_persistence_threshold`)."""


@dataclass(frozen=True)
class Tensors:
    """Bytes of each process."""

    weights: list[int]
    gradients: list[int]
    """When the optimizer steps, at the fullest of its turns."""
    gradients_in_backward: list[int]
    """At the end of the last backward pass."""


@dataclass(frozen=True)
class Setting:
    processes: int
    itemsize: int
    """Of the model's values."""
    micro_batches: int = 1
    round_to: int = 1


def divided_tensors(
    shown: Sequence[Shown], parameters: Sequence[Parameter], strategy: Strategy, at: Setting
) -> Tensors:
    """Of a model of which all `parameters` are trained."""
    if strategy == "fsdp2":
        return _of_fsdp2(parameters, at)
    return _of_zero3(shown, parameters, at) if strategy == "zero3" else _of_flat(shown, strategy, at)


def _of_fsdp2(parameters: Sequence[Parameter], at: Setting) -> Tensors:
    padded = [padded_rows(each.shape, at.processes) for each in parameters]
    own = [sum(rounded(at.itemsize * numel, at.round_to) for numel in padded)] * at.processes
    return Tensors(own, own, own)


def _of_flat(shown: Sequence[Shown], strategy: Strategy, at: Setting) -> Tensors:
    shares = [flat_share(sum(each.numel for each in group), at.processes) for group in shown]
    flat = sum(rounded(at.itemsize * at.processes * share, at.round_to) for share in shares)
    parts = sum(rounded(4 * share, at.round_to) for share in shares)
    everything = at.itemsize * sum(each.numel for group in shown for each in group)
    in_parts = [_InParts(group, share, at.processes) for group, share in zip(shown, shares, strict=True)]
    kept = [
        rounded(at.itemsize * sum(group.whole[rank] for group in in_parts), at.round_to)
        for rank in range(at.processes)
    ]
    sums = [nbytes * (1 if at.micro_batches == 1 else 2) for nbytes in kept]
    return Tensors(
        [flat + parts] * at.processes,
        [_fullest_turn(in_parts, rank, kept[rank], at) for rank in range(at.processes)],
        [everything] * at.processes if strategy == "zero1" else sums,
    )


class _InParts:
    """A group of parameters end to end, by the process in whose part they are."""

    def __init__(self, group: Shown, share: int, processes: int):
        self.share = share
        self.count, self.whole, self.missing = [0] * processes, [0] * processes, [share] * processes
        """How many have values there, how many values these have in all, and what fills the part up."""
        for each in group:
            for rank, size in enumerate(each.sizes):
                if size:
                    self.count[rank] += 1
                    self.whole[rank] += each.numel
                    self.missing[rank] -= size


def _fullest_turn(groups: Sequence[_InParts], rank: int, kept: int, at: Setting) -> int:
    """Of the groups' turns. Gradients of later ones wait, and all are kept until the last of them had its turn."""
    fullest, is_waited_for, filling = 0, False, 0
    for group in reversed(groups):
        # A single piece in float32 is used where it is.
        is_used_in_place = at.itemsize == 4 and group.count[rank] == 1 and not group.missing[rank]
        copied = 0 if is_used_in_place else rounded(4 * group.share, at.round_to)
        fullest = max(fullest, (kept if is_used_in_place or is_waited_for else 0) + filling + copied)
        is_waited_for = is_waited_for or group.count[rank] > 0
        filling += at.itemsize * group.missing[rank]
    return fullest


def _of_zero3(shown: Sequence[Shown], parameters: Sequence[Parameter], at: Setting) -> Tensors:
    parts = [sum(_part(each, at.processes) for each in group) for group in shown]
    model = rounded(at.itemsize * sum(parts), at.round_to)
    copies = sum(rounded(4 * part, at.round_to) for part in parts)
    persistent = sum(
        rounded(at.itemsize * at.processes * -(-each.numel // at.processes), at.round_to)
        for each in parameters
        if each.numel <= PERSISTENT_NUMEL
    )
    kept = rounded(at.itemsize * sum(parts), at.round_to)
    stepping = kept + rounded(4 * max(parts), at.round_to)
    processes = at.processes
    return Tensors([model + copies + persistent] * processes, [stepping] * processes, [kept] * processes)


def _part(each: Division, processes: int) -> int:
    return -(-each.numel // processes)
