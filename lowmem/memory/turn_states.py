"""Which parameters have state in the fullest turn, where they have it in turn. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowmem.memory.architecture import Parameter
from lowmem.memory.state_tensors import Settings


def resting_in_the_fullest_turn(treated: Sequence[tuple[Settings, Parameter]]) -> frozenset[int]:
    """The positions of those without state in it. Turns are drawn, so it is the one with the largest blocks.

    Those with the same settings (the same object) and decay are a group; norms and biases are not decayed.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for position, (settings, parameter) in enumerate(treated):
        if settings.get("projection") == "block" and 0 < settings["density"] < 1:
            groups.setdefault((id(settings), len(parameter.shape) > 1), []).append(position)
    resting: set[int] = set()
    for members in groups.values():
        density = treated[members[0]][0]["density"]
        active = max(1, round(density * len(members)))
        by_size = sorted(members, key=lambda position: -math.prod(treated[position][1].shape))
        resting.update(by_size[active:])
    return frozenset(resting)
