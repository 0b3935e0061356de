"""Simulate the update of each kind of parameter once, and repeat its bytes for all others of that kind.

The layers of a model are alike. A 7B model has 224 matrices in two shapes, and the tiles of one update are
hundreds of operators; simulating two of them instead of all takes a tenth of the time and gives the same
ledger: the state of each parameter is allocated for real, its transient tensors are written down again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem.memory.ledger import Change, Ledger, Life
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.without_values import pretend_step_, step_key


@dataclass(frozen=True)
class _Step:
    like: Tensor
    transient: list[Change]


class RepeatedSteps:
    """Takes the place of `optimizer.step_param`. `ledger()` is that of the step under way, None outside one."""

    def __init__(self, optimizer: LowMemOptimizer, ledger: Callable[[], Ledger | None]):
        self._optimizer = optimizer
        self._ledger = ledger
        self._step_param = optimizer.step_param
        self._seen: dict[Hashable, _Step | None] = {}
        optimizer.step_param = self  # type: ignore[method-assign]

    def __call__(self, param: Tensor, group: dict[str, Any]) -> None:
        ledger = self._ledger()
        if ledger is None or param.grad is None:
            self._step_param(param, group)
            return
        key = step_key(self._optimizer, param, group)
        step = self._seen.get(key)
        if step is not None:
            pretend_step_(self._optimizer, param, group, like=step.like)
            _write_again(ledger, step.transient)
            return
        start = len(ledger.changes)
        self._step_param(param, group)
        if key not in self._seen:
            self._seen[key] = self._repeatable(param, ledger.changes[start:])

    def _repeatable(self, param: Tensor, changes: list[Change]) -> _Step | None:
        """None where an update does more than keep its state and drop all else, so it must run each time."""
        born = {life for life, _ in changes}
        kept = [life.key for life in born if life.alive]
        state = {value.untyped_storage()._cdata for value in self._optimizer.state[param].values()}
        if not state.issuperset(kept):
            return None
        balance: dict[Life, int] = {}
        for life, change in changes:
            balance[life] = balance.get(life, 0) + change
        if any(nbytes < 0 for nbytes in balance.values()):
            return None  # it freed what was there before
        return _Step(param, [change for change in changes if not change[0].alive])


def _write_again(ledger: Ledger, transient: list[Change]) -> None:
    again: dict[Life, Life] = {}
    for life, change in transient:
        if life not in again:
            again[life] = ledger.born(change, life.part, made_by=life.made_by)
        elif again[life].nbytes + change == 0:
            ledger.died(again[life])
        else:
            ledger.resized(again[life], again[life].nbytes + change)
