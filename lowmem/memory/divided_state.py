"""Optimizer state of each of W processes that divide a model, in bytes. Imports no torch.

    value by value    state of the piece that a process has, as of a flat parameter of its size: blocks of int8 codes
                      begin with the piece, and what is one number of a parameter is one number of each piece
    by rows           state of a process' rows, and what every process has of it (`divided_rows`)
    whole matrices    all state of the matrix, at its owner

and `step`, 4 bytes, for each parameter of which a process has state. Under ZeRO the values that an optimizer sees are
float32, and so is state that follows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from lowmem.memory.divided_pieces import Division, Shown, Strategy
from lowmem.memory.divided_rows import of_rows
from lowmem.memory.ledger import rounded
from lowmem.memory.state_formulas import (
    STEP_BYTES,
    Treatment,
    in_fullest_turn,
    state_bytes,
    state_values,
    stored_sizes,
    with_defaults,
)
from lowmem.memory.turn_states import is_untouched


def itemsize_of_stepped(strategy: Strategy, itemsize: int) -> int:
    """Bytes of a value as the optimizer sees it."""
    return 4 if strategy.startswith("zero") else itemsize


def divided_state_bytes(
    shown: Sequence[Shown], processes: int, itemsize: int, *, round_to: int = 1
) -> list[int]:
    """Of each process, in its fullest turn where parameters take turns; `itemsize` as the optimizer sees values."""
    if not _takes_turns(shown):
        return _in_one_turn([each for group in shown for each in group], processes, itemsize, round_to)
    found = []
    for rank in range(processes):
        here = [each for group in shown for each in group]
        turned = in_fullest_turn([each.treatment for each in here], [each.sizes[rank] for each in here])
        resting = [replace(each, treatment=own) for each, own in zip(here, turned, strict=True)]
        found.append(_in_one_turn(resting, processes, itemsize, round_to)[rank])
    return found


def piece_state_bytes(treatment: Treatment, numel: int, itemsize: int, *, round_to: int = 1) -> int:
    """Of a piece of `numel` values of a parameter whose rule treats every value by itself."""
    if numel == 0 or is_untouched(treatment.algorithm, treatment.settings):
        return 0
    settings = with_defaults(treatment.algorithm, treatment.settings)
    tensors = state_values(treatment.algorithm, settings, treatment.parameter.shape).values()
    pieces = [each if each.role == "scalar" else replace(each, numel=numel) for each in tensors]
    sizes = [size for each in pieces for size in stored_sizes(each, settings, itemsize)]
    return sum(rounded(size, round_to) for size in (*sizes, STEP_BYTES))


def rows_state_bytes(treatment: Treatment, numel: int, itemsize: int, *, round_to: int = 1) -> int:
    """Of rows with `numel` values of a matrix that is updated by rows."""
    settings, shape = (
        with_defaults(treatment.algorithm, treatment.settings),
        treatment.parameter.shape,
    )
    tensors = state_values(treatment.algorithm, settings, shape)
    rows = [of_rows(name, each, shape, numel // shape[1]) for name, each in tensors.items()]
    sizes = [size for each in rows for size in stored_sizes(each, settings, itemsize)]
    return sum(rounded(size, round_to) for size in (*sizes, STEP_BYTES))


def total_of_each(
    divisions: Sequence[Division], processes: int, key: Callable[[Division], object], of: _OfPiece
) -> list[int]:
    """Of each process the sum of `of(division, values it has)`; divisions with the same key and sizes are alike."""
    alike: Counter[tuple[object, tuple[int, ...]]] = Counter()
    first: dict[tuple[object, tuple[int, ...]], Division] = {}
    for each in divisions:
        alike[key(each), each.sizes] += 1
        first.setdefault((key(each), each.sizes), each)
    total = [0] * processes
    for which, count in alike.items():
        by_size = {size: count * of(first[which], size) for size in set(which[1])}
        total = [sum_ + by_size[size] for sum_, size in zip(total, which[1], strict=True)]
    return total


_OfPiece = Callable[[Division, int], int]


def _in_one_turn(divisions: Sequence[Division], processes: int, itemsize: int, round_to: int) -> list[int]:
    total = total_of_each(
        [each for each in divisions if each.owner is None],
        processes,
        key=lambda each: (id(each.treatment.settings), each.treatment.parameter.shape),
        of=lambda each, size: (
            piece_state_bytes(each.treatment, size, itemsize, round_to=round_to)
            if each.on_rows is None
            else rows_state_bytes(each.treatment, size, itemsize, round_to=round_to)
        ),
    )
    known: dict[object, int] = {}
    for each in divisions:
        if each.owner is None:
            continue
        own, shape = each.treatment, each.treatment.parameter.shape
        key = (id(own.settings), shape)
        if key not in known:
            known[key] = state_bytes(own.algorithm, own.settings, shape, itemsize, round_to=round_to)
        total[each.owner] += known[key]
    return total


def _takes_turns(shown: Sequence[Shown]) -> bool:
    treated = [each.treatment for group in shown for each in group]
    return in_fullest_turn(treated) != treated
