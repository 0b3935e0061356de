"""Where each parameter's values lie when W processes divide a model, and who updates each matrix. Imports no torch.

    fsdp2     rows in W chunks of ceil(rows / W), the last ones shorter or empty, as torch.chunk cuts
    zero1, 2  the parameters of a group end to end, cut into W equal parts of an even number of values
    zero3     every parameter flat, in W parts of ceil(numel / W), the last ones shorter or empty

What an optimizer is shown at one time is a group of parameters, and under ZeRO-3 a part of a group. A twin of what
`lowmem.run.layouts` finds in PyTorch's and DeepSpeed's own records; the tests hold both equal over real processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem.memory.architecture import Shape
from lowmem.memory.divided_rows import OnRows, by_rows
from lowmem.memory.frugal_states import frugal_rule
from lowmem.memory.low_rank_states import LOW_RANK_STATES
from lowmem.memory.state_formulas import Treatment, with_defaults
from lowmem.memory.state_tensors import Settings, is_low_rank, is_matrix

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
DIVIDING: tuple[Strategy, ...] = ("fsdp2", "zero1", "zero2", "zero3")

ALIGNED_TO = 2
"""ZeRO-1 and 2 cut parts of a multiple of this many values (`nccl_start_alignment_factor`)."""

SUB_GROUP_NUMEL = 1_000_000_000
"""ZeRO-3 shows an optimizer so many of a process' own values of a group at one time (`sub_group_size`)."""

_MATRICES_WHOLE = frozenset({"sinkgd", "swan", "muon"})
"""Optimizers that step matrices whole and treat the rest value by value."""


@dataclass(frozen=True)
class Division:
    """One parameter. `sizes[k]` of its values are at process k, and `owner` updates it; None where each its own.

    `on_rows` says how, where what each updates are rows of a matrix.
    """

    treatment: Treatment
    sizes: tuple[int, ...]
    owner: int | None
    on_rows: OnRows | None = None

    @property
    def numel(self) -> int:
        return self.treatment.parameter.numel

    @property
    def is_sent(self) -> bool:
        """Whether values of it must travel to be updated: never where its owner has all of them."""
        return self.owner is not None and self.sizes[self.owner] < self.numel


Shown = list[Division]
"""What an optimizer is shown at one time."""


def needs_whole(algorithm: str, settings: Settings, shape: Shape) -> bool:
    """Whether the rule of a parameter needs all of it; a test holds this equal to the rules' `scope`."""
    settings = with_defaults(algorithm, settings)
    if algorithm in LOW_RANK_STATES:
        return is_low_rank(settings, shape)
    if algorithm == "frugal":
        return frugal_rule(settings, shape) == "split"
    return algorithm == "adafactor" or (algorithm in _MATRICES_WHOLE and is_matrix(shape))


def param_groups(treated: Sequence[Treatment]) -> list[list[Treatment]]:
    """As `build_optimizer` makes them: by settings, norms and biases apart."""
    groups: dict[tuple[int, bool], list[Treatment]] = {}
    numbers: dict[int, int] = {}
    for each in treated:
        number = numbers.setdefault(id(each.settings), len(numbers))
        groups.setdefault((number, len(each.parameter.shape) < 2), []).append(each)
    return [groups[key] for key in sorted(groups)]


def divided(treated: Sequence[Treatment], strategy: Strategy, processes: int) -> list[Shown]:
    """All parameters over `processes`, in the order in which they are shown to the optimizer."""
    found: list[Shown] = []
    for group in param_groups(treated):
        if strategy in ("zero1", "zero2"):
            sizes = _sizes_of_flat_group([each.parameter.numel for each in group], processes)
        else:
            cut = _sizes_of_rows if strategy == "fsdp2" else _sizes_of_flat
            sizes = [cut(each.parameter.shape, processes) for each in group]
        divisions = _with_owners(group, sizes, processes)
        found += _sub_groups(divisions, processes) if strategy == "zero3" else [divisions]
    return found


def flat_share(numel: int, processes: int) -> int:
    """Values of a process' part of a group of `numel` under ZeRO-1 and 2, what fills it up included."""
    return -(-numel // (ALIGNED_TO * processes)) * ALIGNED_TO


def padded_rows(shape: Shape, processes: int) -> int:
    """Values that FSDP2 keeps of a parameter in each process: as many as the largest chunk has."""
    return -(-shape[0] // processes) * math.prod(shape[1:])


def _with_owners(group: Sequence[Treatment], sizes: Sequence[tuple[int, ...]], processes: int) -> Shown:
    """The owner of a matrix that is not updated by rows is the one of its holders that has the least to do so far."""
    load = [0] * processes
    found = []
    for each, own in zip(group, sizes, strict=True):
        owner = on_rows = None
        is_matrix_rule = needs_whole(each.algorithm, each.settings, each.parameter.shape)
        if is_matrix_rule:
            filled = with_defaults(each.algorithm, each.settings)
            on_rows = by_rows(each.algorithm, filled, each.parameter.shape, own)
        if is_matrix_rule and on_rows is None:
            holders = range(processes) if all(own) else [rank for rank, size in enumerate(own) if size]
            owner = min(holders or [0], key=load.__getitem__)
            load[owner] += each.parameter.numel
        found.append(Division(each, own, owner, on_rows))
    return found


def _sub_groups(divisions: Shown, processes: int) -> list[Shown]:
    found: list[Shown] = []
    numel = SUB_GROUP_NUMEL
    for each in divisions:
        if numel >= SUB_GROUP_NUMEL:
            found.append([])
            numel = 0
        found[-1].append(each)
        numel += -(-each.numel // processes)
    return found


@functools.lru_cache(maxsize=256)
def _sizes_of_rows(shape: Shape, processes: int) -> tuple[int, ...]:
    return _chunks(math.prod(shape), padded_rows(shape, processes), processes)


@functools.lru_cache(maxsize=256)
def _sizes_of_flat(shape: Shape, processes: int) -> tuple[int, ...]:
    numel = math.prod(shape)
    return _chunks(numel, -(-numel // processes), processes)


def _chunks(numel: int, chunk: int, processes: int) -> tuple[int, ...]:
    return tuple(max(0, min(chunk, numel - rank * chunk)) for rank in range(processes))


def _sizes_of_flat_group(numels: Sequence[int], processes: int) -> list[tuple[int, ...]]:
    share = flat_share(sum(numels), processes)
    found, start = [], 0
    for numel in numels:
        sizes = [0] * processes
        for rank in range(start // share, min(processes, -(-(start + numel) // share))):
            sizes[rank] = min(start + numel, (rank + 1) * share) - max(start, rank * share)
        found.append(tuple(sizes))
        start += numel
    return found
