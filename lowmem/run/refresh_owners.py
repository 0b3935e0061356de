"""Data parallel training: each basis is found by one process and sent to the others.

All processes have the same gradient, so each could find the basis by itself, W times the same work; on unlike devices
the last bits of W decompositions differ, and with them the processes' weights. With one owner for each matrix a process
makes its share of the decompositions, chosen so that all have about as much to do.

For a refresh of a matrix (m, n), m <= n, its basis is sent, m r values, and where moments are rotated these, 2 r n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.numerics.held_weights import shape_of
from lowmem.optim.rule import Context, Rule


class RefreshOwners:
    """Stands in `LowMemOptimizer.refresh_owners`. All processes must refresh the same matrices in the same order."""

    def __init__(self, params: Sequence[Tensor]):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.owner: dict[Tensor, int] = {}
        self.sent = 0
        """Values that this process has sent so far."""
        load = [0] * self.processes
        for param in params:
            cost = decomposition_cost(shape_of(param))
            owner = load.index(min(load))
            load[owner] += cost
            self.owner[param] = owner

    def __call__(
        self, param: Tensor, rule: Rule, ctx: Context, find: Callable[[], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], bool]:
        """What changes in the state of `param`, and whether another process has found it: only the owner calls `find`.

        What a rule remembers of state that has come from elsewhere is to be read from that.
        """
        if param not in self.owner or not has_basis(rule, shape_of(param)):
            return find(), False
        owner, slots = self.owner[param], rule.slots(shape_of(param))
        failures: list[str] = []
        changed: dict[str, Tensor] = {}
        if owner == self.rank:
            changed = {name: value.float().contiguous() for name, value in ctx.watch(failures, find).items()}
        flags = [name in changed for name in slots] + [bool(failures)]
        told = torch.tensor(flags, dtype=torch.uint8, device=param.device)
        dist.broadcast(told, owner)
        *has_changed, failed = map(bool, told.tolist())
        for (name, slot), is_new in zip(slots.items(), has_changed, strict=True):
            if is_new:
                value = changed.get(name)
                if value is None:
                    value = torch.empty(slot.shape, dtype=torch.float32, device=param.device)
                dist.broadcast(value, owner)
                changed[name] = value
                self.sent += value.numel() if owner == self.rank else 0
        if failed and owner != self.rank:
            ctx.failed(f"its decomposition did not converge on process {owner}")
        found = {name: value.view(slots[name].shape) for name, value in changed.items()}
        return found, bool(found) and owner != self.rank


def has_basis(rule: Rule, shape: tuple[int, ...]) -> bool:
    """Whether a refresh is worth sending: a basis in state, not numbers that each process draws for itself."""
    return any(slot.role == "basis" for slot in rule.slots(shape).values())


def decomposition_cost(shape: tuple[int, ...]) -> int:
    """In units of m^2 n."""
    if len(shape) < 2:
        return 0
    *batch, rows, columns = shape
    return int(torch.Size(batch).numel()) * min(rows, columns) * rows * columns
