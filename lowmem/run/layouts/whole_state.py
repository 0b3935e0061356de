"""An optimizer's state by the names of whole parameters, from what any launch has saved and for any other.

    {"groups": [settings and names], "state": {name: {key: tensor}}, "weights": {name: tensor}}

State of a rule that needs the matrix is kept as it was, codes and scales too, for a matrix is stepped whole everywhere.
That of a rule that treats every value by itself is put together from the pieces, in float where it was in codes of 8
bits, whose blocks another division cuts elsewhere. `weights` are those that are finer than the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import RefusedError
from lowmem.numerics.held_weights import shape_of
from lowmem.optim import registry
from lowmem.optim.codecs import WHOLE, Codec
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.optimizer_state import STEPS, storage_formats, turn_number
from lowmem.optim.rule import Rule, Turn
from lowmem.optim.storage import codec_for
from lowmem.run.layouts.piece_optimizer import PieceOptimizer
from lowmem.run.layouts.saved_pieces import own_weights

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
    ranges = {name: [(0, _numel(shape))] for name, shape in shapes.items()}
    return _whole_state([saved], shapes, ranges, [{}])


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
        [each["state"] for each in saved], shapes, ranges, [each["weights"] for each in saved]
    )


def _whole_state(
    saved: Sequence[Mapping[str, Any]],
    shapes: Shapes,
    ranges: Mapping[str, Sequence[Sequence[int]]],
    weights: Sequence[Mapping[str, Tensor]],
) -> dict[str, Any]:
    state: dict[str, dict[str, Tensor]] = {}
    for rank, each in enumerate(saved):
        for found in _parameters(each, shapes):
            kept = state.setdefault(found.name, {})
            if found.rule.scope == "matrix":
                kept |= found.stored
            else:
                _put_piece_(kept, found, shapes[found.name], slice(*ranges[found.name][rank]))
    finer: dict[str, Tensor] = {}
    for rank, own in enumerate(weights):
        for name, value in own.items():
            whole = finer.setdefault(name, value.new_empty(_numel(shapes[name])))
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


def _codecs(
    group: Mapping[str, Any], rule: Rule, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Codec]:
    formats = storage_formats(group)
    return {name: codec_for(name, slot, formats, dtype) for name, slot in rule.slots(shape).items()}


def _put_piece_(kept: dict[str, Tensor], found: _Saved, shape: tuple[int, ...], part: slice) -> None:
    """A piece's state, decoded, into the whole one."""
    own = (part.stop - part.start,)
    slots = found.rule.slots(own)
    codecs = _codecs(found.group, found.rule, own, torch.float32)
    keys = {key for codec in codecs.values() for key in codec.tensors()}
    kept |= {key: value for key, value in found.stored.items() if key not in keys}  # counts
    for name, codec in codecs.items():
        if slots[name].role in ("factor", "scalar"):
            kept[name] = found.stored[name]
            continue
        flat = {key: found.stored[key].reshape(-1) for key in codec.tensors()}
        is_float = flat[name].is_floating_point()
        value = flat[name] if is_float else codec.load(flat, WHOLE).view(-1)
        whole = kept.setdefault(name, value.new_zeros(_numel(shape)).view(shape))
        whole.view(-1)[part] = value


# ---------------------------------------------------------------- into an optimizer


def load_whole_state_(optimizer: LowMemOptimizer, whole: Mapping[str, Any]) -> None:
    """Into one that has whole parameters, or pieces. What is kept in another dtype, or in codes, is rounded to nearest.

    Raises RefusedError where the optimizer treats a parameter in another way than the one that was saved.
    """
    by_name = {name: group for group in whole["groups"] for name in group["param_names"]}
    for group in optimizer.param_groups:
        for name in _names(group):
            _refuse_other_rule(name, group, by_name.get(name))
        steps = [by_name[name][STEPS] for name in _names(group) if STEPS in by_name[name]]
        group.update({STEPS: steps[0]} if steps else {})
    optimizer.state.clear()
    optimizer._forget()
    for group in optimizer.param_groups:
        for param, name in zip(group["params"], _names(group), strict=True):
            stored = whole["state"].get(name)
            if stored:
                _load_(optimizer, param, group, name, stored)
    optimizer._forget()
    if isinstance(optimizer, PieceOptimizer):
        for name, value in own_weights(optimizer).items():
            if name in whole["weights"]:
                value.copy_(whole["weights"][name].view(-1)[_part(optimizer, name)])


def _names(group: Mapping[str, Any]) -> Sequence[str]:
    if "param_names" not in group:
        raise RefusedError(
            "whole state is kept by the names of parameters: make the optimizer with lowmem.build_optimizer, or from "
            "model.named_parameters()."
        )
    return group["param_names"]


def _refuse_other_rule(name: str, group: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    found = None if saved is None else saved["algorithm"]
    if found != group["algorithm"]:
        raise RefusedError(
            f"the saved state has {found or 'nothing'} for {name}, and here it is {group['algorithm']}'s. Continue "
            "with the recipe that saved it, or start from the weights alone: model.name_or_path is the checkpoint."
        )


def _part(optimizer: PieceOptimizer, name: str) -> slice:
    piece = next(each for each in optimizer.all_pieces() if each.name == name)
    return slice(*piece.ranges[optimizer.rank])


def _load_(
    optimizer: LowMemOptimizer,
    param: Tensor,
    group: dict[str, Any],
    name: str,
    stored: Mapping[str, Tensor],
) -> None:
    rule = optimizer.rule_of(param, group)
    is_matrix = rule.scope == "matrix"
    if isinstance(optimizer, PieceOptimizer) and (
        not optimizer.owns(param) if is_matrix else not param.numel()
    ):
        return
    own = optimizer._stored(param, group, rule)
    codecs = optimizer._codecs(param, group, rule)
    keys = {key for codec in codecs.values() for key in codec.tensors()}
    for key, value in stored.items():
        if key not in keys and key not in codecs:
            own[key] = value.clone()
    if is_matrix:
        for key in keys:
            _refuse_other_size(name, key, own[key].shape, stored.get(key))
            own[key].copy_(stored[key])
        return
    part = _part(optimizer, name) if isinstance(optimizer, PieceOptimizer) else WHOLE
    slots = rule.slots(shape_of(param))
    for slot, codec in codecs.items():
        found = stored.get(slot)
        if slots[slot].role in ("factor", "scalar"):
            _refuse_other_size(name, slot, codec.shape, found)
            own[slot].copy_(stored[slot])
            continue
        mine = None if found is None else found.view(-1)[part]
        _refuse_other_size(name, slot, (_numel(codec.shape),), mine)
        assert mine is not None
        codec.save_(own, mine.float().view(codec.shape), WHOLE, None)


def _refuse_other_size(name: str, key: str, expected: Sequence[int], found: Tensor | None) -> None:
    if found is None or tuple(found.shape) != tuple(expected):
        size = "nothing" if found is None else f"a tensor of {tuple(found.shape)}"
        raise RefusedError(
            f"the saved state has {size} as {key} of {name}, and this optimizer keeps {tuple(expected)}. Continue with "
            "the settings that it was saved with, such as rank and storage."
        )


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
