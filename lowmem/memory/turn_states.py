"""Which parameters have state in the fullest turn, where they have it in turn. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from lowmem.memory.architecture import Parameter
from lowmem.memory.state_tensors import Settings

Treated = tuple[str, Settings, Parameter]
"""An optimizer's name, its settings, and what it updates."""

_NEVER = None


def is_untouched(algorithm: str, settings: Settings) -> bool:
    """Whether a parameter has neither state nor gradient in the fullest turn."""
    return algorithm == "block_adam" and bool(settings.get("rests"))


def resting_in_the_fullest_turn(
    treated: Sequence[Treated], numels: Sequence[int] | None = None
) -> frozenset[int]:
    """The positions of those without state in it: of all but the largest blocks, of which a turn may have k.

    numels: how many values of each count, by default all.
    """
    sizes = [math.prod(parameter.shape) for _, _, parameter in treated] if numels is None else numels
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    previous: dict[int, Hashable] = {}
    for position, (algorithm, settings, parameter) in _as_in_groups(treated):
        group, block = _group_and_block(algorithm, settings, parameter, previous.get(id(settings)))
        if group is not None:
            previous[id(settings)] = block
            groups.setdefault(group, {}).setdefault(block, []).append(position)
    resting: set[int] = set()
    for blocks in groups.values():
        never = blocks.pop(_NEVER, [])
        by_size = sorted(blocks.values(), key=lambda members: -sum(sizes[each] for each in members))
        k = _active(treated[by_size[0][0]], len(by_size)) if by_size else 0
        resting.update(never, *by_size[k:])
    return frozenset(resting)


def _as_in_groups(treated: Sequence[Treated]) -> list[tuple[int, Treated]]:
    """Vectors last, as norms and biases have groups of their own, which are not decayed."""
    return sorted(enumerate(treated), key=lambda each: len(each[1][2].shape) < 2)


def _group_and_block(
    algorithm: str, settings: Settings, parameter: Parameter, before: Hashable
) -> tuple[Hashable, Hashable]:
    """Who takes turns with whom, None for a parameter that always has state, and which are one block."""
    is_vector = len(parameter.shape) < 2
    if algorithm == "frugal" and settings["projection"] == "block" and 0 < settings["density"] < 1:
        return (id(settings), is_vector), parameter.name
    if algorithm != "block_adam":
        return None, None
    if parameter.layer is not None:
        return id(settings), parameter.layer
    if settings["others"] == "frozen":
        return id(settings), _NEVER
    return id(settings), before if is_vector and before is not None else parameter.name


def _active(first: Treated, blocks: int) -> int:
    algorithm, settings, _ = first
    if algorithm == "frugal":
        return max(1, round(settings["density"] * blocks))
    return min(blocks, settings["active"])
