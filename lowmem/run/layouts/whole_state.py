"""An optimizer's state by the names of whole parameters, from what any launch has saved and for any other.

    {"groups": [settings and names], "state": {name: {key: tensor}}, "weights": {name: tensor}}

State of a matrix that was stepped whole is kept as it was, codes and scales too. That of values or rows which were
stepped apart is put together from the pieces, in float where it was in codes of 8 bits, whose blocks another division
cuts elsewhere. `weights` are those that are finer than the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import RefusedError
from lowmem.optim import registry
from lowmem.optim.codecs import WHOLE
from lowmem.optim.optimizer_state import turn_number
from lowmem.optim.rule import Rule, Turn
from lowmem.run.layouts.state_parts import RowsOfState, codecs_of, numel_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Saved:
    """State of a parameter in one process' file."""

    name: str
    group: Mapping[str, Any]
    stored: Mapping[str, Tensor]
    rule: Rule


def whole_state_of_one(saved: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """From the state dict of an optimizer that had whole parameters."""
    ranges = {name: [(0, numel_of(shape))] for name, shape in shapes.items()}
    return _whole_state([saved], shapes, ranges, [{}], [])


def whole_state_of_pieces(saved: Sequence[Mapping[str, Any]], shapes: Shapes) -> dict[str, Any]:
    """From what `saved_pieces` gave on every process, in the order of their ranks.

    Raises RefusedError where they are not those of one launch.
    """
    ranges = saved[0]["places"]["ranges"]
    for rank, each in enumerate(saved):
        places = each["places"]
        if (places["rank"], places["processes"], places["ranges"]) != (rank, len(saved), ranges):
            raise RefusedError(
                f"the file of process {places['rank']} of {places['processes']} is not of the same launch as the "
                "others: parameters lie elsewhere in it."
            )
    return _whole_state(
        [each["state"] for each in saved],
        shapes,
        ranges,
        [each["weights"] for each in saved],
        saved[0]["places"]["by_rows"],
    )


def _whole_state(
    saved: Sequence[Mapping[str, Any]],
    shapes: Shapes,
    ranges: Mapping[str, Sequence[Sequence[int]]],
    weights: Sequence[Mapping[str, Tensor]],
    by_rows: Sequence[str],
) -> dict[str, Any]:
    state: dict[str, dict[str, Tensor]] = {}
    for rank, each in enumerate(saved):
        for found in _parameters(each, shapes):
            kept = state.setdefault(found.name, {})
            if found.name in by_rows:
                _put_rows_(kept, found, shapes[found.name], ranges[found.name][rank])
            elif found.rule.scope == "matrix":
                kept |= found.stored
            else:
                _put_piece_(kept, found, shapes[found.name], slice(*ranges[found.name][rank]))
    finer: dict[str, Tensor] = {}
    for rank, own in enumerate(weights):
        for name, value in own.items():
            whole = finer.setdefault(name, value.new_empty(numel_of(shapes[name])))
            whole[slice(*ranges[name][rank])] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in saved[0]["param_groups"]
    ]
    return {
        "groups": groups,
        "state": state,
        "weights": {name: value.view(shapes[name]) for name, value in finer.items()},
    }


def _parameters(saved: Mapping[str, Any], shapes: Shapes) -> Iterator[_Saved]:
    """Those that have state in it."""
    groups = saved["param_groups"]
    for group in groups:
        blocks = _blocks_of(group, groups, shapes)
        for index, name, place in zip(group["params"], group["param_names"], blocks, strict=True):
            stored = saved["state"].get(index)
            if stored:
                rule = registry.optimizer_class(group["algorithm"]).rule(group, shapes[name])
                number = turn_number(group)
                if number is not None:
                    rule = rule.in_turn(Turn(number, *place, group["seed"]))
                yield _Saved(name, group, stored, rule)


def _blocks_of(
    group: Mapping[str, Any], groups: Sequence[dict[str, Any]], shapes: Shapes
) -> list[tuple[int, int]]:
    """Block of each parameter of `group`, as an optimizer's groups would give it."""
    alike = [each for each in groups if each["algorithm"] == group["algorithm"]]
    with_tensors = [
        {**each, "params": [torch.empty(shapes[name], device="meta") for name in each["param_names"]]}
        for each in alike
    ]
    found = registry.optimizer_class(group["algorithm"]).blocks(with_tensors)
    return found[next(at for at, each in enumerate(alike) if each is group)]


def _put_piece_(kept: dict[str, Tensor], found: _Saved, shape: tuple[int, ...], part: slice) -> None:
    """A piece's state, decoded, into the whole one."""
    own = (part.stop - part.start,)
    slots = found.rule.slots(own)
    codecs = codecs_of(found.group, found.rule, own, torch.float32)
    keys = {key for codec in codecs.values() for key in codec.tensors()}
    kept |= {key: value for key, value in found.stored.items() if key not in keys}  # counts
    for name, codec in codecs.items():
        if slots[name].role in ("factor", "scalar"):
            kept[name] = found.stored[name]
            continue
        flat = {key: found.stored[key].reshape(-1) for key in codec.tensors()}
        is_float = flat[name].is_floating_point()
        value = flat[name] if is_float else codec.load(flat, WHOLE).view(-1)
        whole = kept.setdefault(name, value.new_zeros(numel_of(shape)).view(shape))
        whole.view(-1)[part] = value


def _put_rows_(kept: dict[str, Tensor], found: _Saved, shape: tuple[int, ...], own: Sequence[int]) -> None:
    """What is of some rows, decoded, into the whole one; the rest, which every process has, as it is."""
    rows = slice(*(at // shape[1] for at in own))
    part = RowsOfState(found.rule, shape, rows)
    codecs = codecs_of(found.group, part.rule, part.shape, torch.float32)
    divided = {key for name, codec in codecs.items() if part.divides(name) for key in codec.tensors()}
    kept |= {key: value for key, value in found.stored.items() if key not in divided}
    for name, codec in codecs.items():
        if part.divides(name):
            value = found.stored[name]
            value = value if value.is_floating_point() else codec.load(found.stored, WHOLE)
            whole = kept.setdefault(name, value.new_zeros(part.whole[name].shape))
            part.within(name, whole).copy_(value)
