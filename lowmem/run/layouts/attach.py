"""Have an optimizer make its steps in pieces, once training has sharded its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lowmem.errors import RefusedError
from lowmem.optim.engine import LowMemOptimizer
from lowmem.run.layouts.fsdp2 import RowShards
from lowmem.run.layouts.piece_optimizer import PieceOptimizer
from lowmem.run.layouts.zero import FlatPartitions, FlatSlices, NamedParams


class StepsInPieces:
    """Stands in `LowMemOptimizer.steps_in_pieces`; finds the pieces at the first step."""

    def __init__(self, optimizer: LowMemOptimizer, find: Callable[[], PieceOptimizer]):
        self.optimizer = optimizer
        self._find = find
        self._pieces: PieceOptimizer | None = None

    def __call__(self, outer: LowMemOptimizer) -> None:
        self.pieces.step_for(outer)

    @property
    def pieces(self) -> PieceOptimizer:
        """Raises RefusedError where parameters are not in pieces, or not in ones that are known here."""
        if self._pieces is None:
            self._pieces = self._find()
        return self._pieces


def attach_to_fsdp2(optimizer: LowMemOptimizer, model: nn.Module) -> StepsInPieces:
    """To be called before or after `fully_shard`; the first step looks at the parameters that there are then."""

    def find() -> PieceOptimizer:
        names = {id(param): name for name, param in model.named_parameters()}
        groups = optimizer.param_groups
        return PieceOptimizer(groups, [group["params"] for group in groups], RowShards(names))

    return _attached(optimizer, find)


def attach_to_zero(optimizer: LowMemOptimizer) -> StepsInPieces:
    """To be called before `deepspeed.initialize`, which takes the parameters out of the optimizer's groups."""
    groups = list(optimizer.param_groups)
    named: NamedParams = [list(zip(group["param_names"], group["params"], strict=True)) for group in groups]

    def find() -> PieceOptimizer:
        first: Any = next(param for params in named for _, param in params)
        zero = getattr(first, "_z3_optimizer", None)
        if zero is not None:
            return _of_slices(groups, named, zero)
        if not hasattr(first, "_hp_mapping"):
            raise RefusedError(
                f"DeepSpeed has left {named[0][0][0]} whole or keeps no record of where it lies. Supported are its "
                "stages 1, 2 and 3."
            )
        flats = [group["params"][0] for group in groups]
        process_group: dist.ProcessGroup | None = getattr(first, "_dp_group", None)
        layout = FlatPartitions(named, flats, process_group)
        return PieceOptimizer(groups, [[flat] for flat in flats], layout, process_group)

    return _attached(optimizer, find)


def _of_slices(groups: Sequence[dict[str, Any]], named: NamedParams, zero: Any) -> PieceOptimizer:
    process_group: dist.ProcessGroup | None = zero.dp_process_group
    tensors: list[list[Tensor]] = [[] for _ in groups]
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        tensors[zero.sub_group_to_group_id[number]].append(flat)
    return PieceOptimizer(groups, tensors, FlatSlices(named, zero, process_group), process_group)


def _attached(optimizer: LowMemOptimizer, find: Callable[[], PieceOptimizer]) -> StepsInPieces:
    if "param_names" not in optimizer.param_groups[0]:
        raise RefusedError(
            "sharded parameters are known by their names: make the optimizer with lowmem.build_optimizer, or from "
            "model.named_parameters()."
        )
    steps = StepsInPieces(optimizer, find)
    optimizer.steps_in_pieces = steps
    return steps
