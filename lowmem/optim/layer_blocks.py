"""A model's parameters in blocks, one a layer, by the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lowmem.numerics.held_weights import shape_of

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")

NO_BLOCK = -1
"""Of a parameter that never has a turn."""


def layer_of(name: str) -> str | None:
    """model.layers.7 for model.layers.7.mlp.up_proj.weight; None for a parameter outside of the layers."""
    found = _LAYER.match(name)
    return None if found is None else found.group()


def has_layers(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether any parameter's name has a layer's number."""
    return any(layer_of(name) for group in groups for name in group.get("param_names", ()))


def layer_blocks(groups: Sequence[dict[str, Any]], *, with_others: bool) -> list[list[tuple[int, int]]]:
    """Which block each parameter of each group is of, numbered in the order of their first parameters, and of how many.

    A layer is a block, over all groups. Outside of the layers a matrix (embedding, head) is one, and a vector (the
    last norm) belongs to the block before it; without `with_others` these have none. Where the parameters have no
    names, or no name has a number, every tensor is a block.
    """
    numbers: dict[str, int] = {}
    found: list[list[int]] = []
    by_layer = has_layers(groups)
    for place, group in enumerate(groups):
        names = group.get("param_names") if by_layer else None
        blocks: list[int] = []
        for index, param in enumerate(group["params"]):
            name = f"{place} {index}" if names is None else names[index]
            layer = layer_of(name) if by_layer else name
            if layer is None and not with_others:
                blocks.append(NO_BLOCK)
            elif layer is None and len(shape_of(param)) < 2 and blocks:
                blocks.append(blocks[-1])
            else:
                blocks.append(numbers.setdefault(layer or name, len(numbers)))
        found.append(blocks)
    return [[(block, len(numbers)) for block in blocks] for blocks in found]
