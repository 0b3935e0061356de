"""DeepSpeed ZeRO: an optimizer sees flat tensors in which pieces of many parameters lie end to end.

ZeRO-1 and 2 give each param group one flat tensor, a process' equal share of all its parameters. ZeRO-3 gives each
sub-group of parameters one, in which a process has an equal share of every parameter. What lies where is read from
DeepSpeed's own records (0.19): `_hp_mapping` of a parameter, `grad_position` of the ZeRO-3 optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.errors import RefusedError
from lowmem.run.layouts.pieces import Piece

NamedParams = Sequence[Sequence[tuple[str, Tensor]]]
"""The parameters of every group with their names, as they were before DeepSpeed took them over."""


def shape_of(param: Any) -> tuple[int, ...]:
    """Of the whole parameter: one that ZeRO-3 has divided shows an empty tensor."""
    return tuple(getattr(param, "ds_shape", param.shape))


class FlatPartitions:
    """ZeRO-1 and 2."""

    always_has_gradients = True

    def __init__(self, named: NamedParams, flats: Sequence[Tensor], group: dist.ProcessGroup | None):
        rank = dist.get_rank(group)
        self.keeps_finer_weights = _are_finer(flats, named)
        mine = {name: _range_of(param) for params in named for name, param in params}
        everyones: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyones, mine, group=group)
        self._pieces: dict[int, list[Piece]] = {}
        for params, flat in zip(named, flats, strict=True):
            own = [
                _piece(
                    name, shape_of(param), [each[name] for each in everyones], flat, _offset_of(param), rank
                )
                for name, param in params
            ]
            for piece, (name, param) in zip(own, params, strict=True):
                start, stop = piece.ranges[rank]
                _refuse_other_values(name, piece.weight(), param.detach().reshape(-1)[start:stop])
            self._pieces[id(flat)] = own

    def pieces_of(self, param: Tensor) -> Sequence[Piece]:
        return self._pieces[id(param)]


class FlatSlices:
    """ZeRO-3. `flats`: the flat tensor of each sub-group, by DeepSpeed's numbers."""

    always_has_gradients = True

    def __init__(self, named: NamedParams, zero: Any, group: dist.ProcessGroup | None):
        processes, rank = dist.get_world_size(group), dist.get_rank(group)
        self.keeps_finer_weights = _are_finer(zero.fp32_partitioned_groups_flat, named)
        names = {id(param): name for params in named for name, param in params}
        self._pieces: dict[int, list[Piece]] = {}
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            own = []
            for param in params:
                _, offset, share = zero.grad_position[zero.get_param_id(param)]
                numel = param.ds_numel
                ranges = [(min(k * share, numel), min((k + 1) * share, numel)) for k in range(processes)]
                own.append(_piece(names[id(param)], shape_of(param), ranges, flat, offset, rank))
                held = param.ds_tensor.detach().reshape(-1)[: own[-1].numel_at(rank)]
                _refuse_other_values(names[id(param)], own[-1].weight(), held)
            self._pieces[id(flat)] = own

    def pieces_of(self, param: Tensor) -> Sequence[Piece]:
        return self._pieces[id(param)]


def _piece(
    name: str,
    shape: tuple[int, ...],
    ranges: Sequence[tuple[int, int]],
    flat: Tensor,
    offset: int,
    rank: int,
) -> Piece:
    start, stop = ranges[rank]
    place = slice(offset, offset + stop - start)

    def grad() -> Tensor | None:
        return None if flat.grad is None else flat.grad[place]

    return Piece(name, shape, tuple(ranges), lambda: flat.detach()[place], grad)


def _are_finer(flats: Sequence[Tensor], named: NamedParams) -> bool:
    return any(flat.dtype != param.dtype for flat in flats for params in named for _, param in params)


def _range_of(param: Any) -> tuple[int, int]:
    found = param._hp_mapping
    if found is None:
        return (0, 0)
    start = found.lp_fragment_address.start
    return (start, start + found.lp_fragment_address.numel)


def _offset_of(param: Any) -> int:
    found = param._hp_mapping
    return 0 if found is None else int(found.hp_fragment_address.start)


def _refuse_other_values(name: str, piece: Tensor, held: Tensor) -> None:
    """The piece of the optimizer's weights must be the model's: DeepSpeed's records are wrong in some settings."""
    if piece.shape != held.shape or not torch.equal(piece.to(held.dtype), held.to(piece.device)):
        raise RefusedError(
            f"DeepSpeed's records of where {name} lies do not lead to the model's values. Known to do that is "
            "round_robin_gradients: leave it out of DeepSpeed's configuration, and hpZ and quantised weights too."
        )
