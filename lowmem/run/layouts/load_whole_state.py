"""State by the names of whole parameters, into an optimizer that has whole parameters, rows of them, or pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lowmem.errors import RefusedError
from lowmem.numerics.held_weights import shape_of
from lowmem.optim.codecs import WHOLE, Codec
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.optimizer_state import STEPS
from lowmem.optim.rule import Slot
from lowmem.run.layouts.piece_optimizer import PieceOptimizer
from lowmem.run.layouts.saved_pieces import own_weights
from lowmem.run.layouts.state_parts import RowsOfState, codecs_of, numel_of


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
    pieces = optimizer if isinstance(optimizer, PieceOptimizer) else None
    rule = optimizer.rule_of(param, group)
    is_by_rows = pieces is not None and pieces.is_by_rows(param)
    is_whole = rule.scope == "matrix" and not is_by_rows
    if pieces is not None and (not pieces.owns(param) if is_whole else not param.numel()):
        return
    own = optimizer._stored(param, group, rule)
    codecs = optimizer._codecs(param, group, rule)
    keys = {key for codec in codecs.values() for key in codec.tensors()}
    for key, value in stored.items():
        if key not in keys and key not in codecs:
            own[key] = value.clone()
    if is_whole:
        for slot, codec in codecs.items():
            _load_slot_(own, codec, stored, f"{slot} of {name}")
    elif is_by_rows:
        assert pieces is not None
        _load_rows_(own, codecs, stored, pieces, param, group, name)
    else:
        part = WHOLE if pieces is None else _part(pieces, name)
        _load_piece_(own, codecs, stored, rule.slots(shape_of(param)), part, name)


def _load_slot_(own: dict[str, Tensor], codec: Codec, stored: Mapping[str, Tensor], what: str) -> None:
    """As it was kept, or into codes where it was kept in float."""
    found = stored.get(codec.name)
    if found is not None and found.is_floating_point() and not own[codec.name].is_floating_point():
        _refuse_other_size(what, codec.shape, found)
        codec.save_(own, found.float(), WHOLE, None)
        return
    for key in codec.tensors():
        _refuse_other_size(what, own[key].shape, stored.get(key))
        own[key].copy_(stored[key])


def _load_rows_(
    own: dict[str, Tensor],
    codecs: Mapping[str, Codec],
    stored: Mapping[str, Tensor],
    pieces: PieceOptimizer,
    param: Tensor,
    group: dict[str, Any],
    name: str,
) -> None:
    whole_rule, shape = pieces.whole_rule_of(param, group), pieces.piece_of(param).shape
    part = _part(pieces, name)
    rows = RowsOfState(whole_rule, shape, slice(part.start // shape[1], part.stop // shape[1]))
    whole_codecs = codecs_of(group, whole_rule, shape, param.dtype)
    for slot, codec in codecs.items():
        if not rows.divides(slot):
            _load_slot_(own, codec, stored, f"{slot} of {name}")
            continue
        whole, found = whole_codecs[slot], stored.get(slot)
        _refuse_other_size(f"{slot} of {name}", whole.shape, found)
        assert found is not None
        value = found if found.is_floating_point() else whole.load(stored, WHOLE)
        codec.save_(own, rows.within(slot, value).float(), WHOLE, None)


def _load_piece_(
    own: dict[str, Tensor],
    codecs: Mapping[str, Codec],
    stored: Mapping[str, Tensor],
    slots: Mapping[str, Slot],
    part: slice,
    name: str,
) -> None:
    for slot, codec in codecs.items():
        found = stored.get(slot)
        if slots[slot].role in ("factor", "scalar"):
            _refuse_other_size(f"{slot} of {name}", codec.shape, found)
            own[slot].copy_(stored[slot])
            continue
        mine = None if found is None else found.view(-1)[part]
        _refuse_other_size(f"{slot} of {name}", (numel_of(codec.shape),), mine)
        assert mine is not None
        codec.save_(own, mine.float().view(codec.shape), WHOLE, None)


def _refuse_other_size(what: str, expected: Sequence[int], found: Tensor | None) -> None:
    if found is None or tuple(found.shape) != tuple(expected):
        size = "nothing" if found is None else f"a tensor of {tuple(found.shape)}"
        raise RefusedError(
            f"the saved state has {size} as {what}, and this optimizer keeps {tuple(expected)}. Continue with "
            "the settings that it was saved with, such as rank and storage."
        )
