"""Simulate the update of each kind of parameter once, and repeat its bytes for all others of that kind.

The layers of a model are alike. A 7B model has 224 matrices in two shapes, and the tiles of one update are
hundreds of operators; simulating two of them instead of all takes a tenth of the time and gives the same
ledger: what an update keeps or frees is allocated and freed for real, in its place in the order, and its
transient tensors are written down again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.memory.ledger import Ledger, Life
from lowmem.numerics.held_weights import drop_grad_, grad_of
from lowmem.numerics.row_gradients import RowGradient, gradient_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.without_values import count_micro_batch_, count_step_, know_as_, make_state_, step_key

STATE, PROJECTED, GRADIENT = "state", "projected", "gradient"  # what is not transient


@dataclass(frozen=True)
class _Update:
    """What one call did: changes in order, each of a transient life by number, or of one of the kinds above."""

    like: Tensor
    changes: list[tuple[int | str, int]]
    made_by: dict[int, str]
    projected: tuple[torch.Size, torch.dtype] | None


class RepeatedSteps:
    """Takes the place of the optimizer's `step_param`, `project_grad_` and `accumulate_grad_`.

    `ledger()` is that of the step under way, None outside one; `at` is told the name of each parameter.
    """

    def __init__(
        self, optimizer: LowMemOptimizer, ledger: Callable[[], Ledger | None], at: Callable[[str], None]
    ):
        self._optimizer = optimizer
        self._ledger = ledger
        self._at = at
        self._seen: dict[Hashable, _Update | None] = {}
        self._step_param, self._project_grad_ = optimizer.step_param, optimizer.project_grad_
        self._accumulate_grad_ = optimizer.accumulate_grad_
        optimizer.step_param = self._step  # type: ignore[method-assign]
        optimizer.project_grad_ = self._project  # type: ignore[method-assign]
        optimizer.accumulate_grad_ = self._accumulate  # type: ignore[method-assign]

    def _step(self, param: Tensor, group: dict[str, Any]) -> None:
        optimizer = self._optimizer
        if isinstance(gradient_of(param), RowGradient):  # a model has one or two
            self._at(optimizer.place_of(param)[0])
            self._step_param(param, group)
            return
        if grad_of(param) is not None or param in optimizer.projected or param in optimizer.accumulated:
            self._at(self._optimizer.place_of(param)[0])
            if self._once("step", param, group, lambda: self._step_param(param, group)):
                count_step_(self._optimizer, param, group)

    def _project(self, param: Tensor, group: dict[str, Any], *, dtype: torch.dtype | None = None) -> None:
        if grad_of(param) is not None:
            self._once(
                f"project to {dtype}", param, group, lambda: self._project_grad_(param, group, dtype=dtype)
            )

    def _accumulate(self, param: Tensor, group: dict[str, Any]) -> None:
        if grad_of(param) is not None and self._once(
            "accumulate", param, group, lambda: self._accumulate_grad_(param, group)
        ):
            count_micro_batch_(self._optimizer, param)

    def _once(self, what: str, param: Tensor, group: dict[str, Any], call: Callable[[], None]) -> bool:
        """Do `call`, or, where its like was done before, only what it does to the bytes; True for the latter."""
        ledger = self._ledger()
        if ledger is None:
            call()
            return False
        key = (what, step_key(self._optimizer, param, group))
        update = self._seen.get(key)
        if update is not None:
            self._repeat(update, ledger, param, group)
            return True
        start, owned = len(ledger.changes), self._owned(param)
        call()
        if key not in self._seen:
            self._seen[key] = self._described(ledger, start, owned | self._owned(param), param)
        return False

    def _owned(self, param: Tensor) -> dict[int, str]:
        """Storages of `param` that may outlive or be freed by a call, and what they are."""
        held = {STATE: list(self._optimizer.state[param].values())}
        held[PROJECTED] = [each for each in [self._optimizer.projected.get(param)] if each is not None]
        held[GRADIENT] = [each for each in [grad_of(param)] if each is not None]
        return {tensor.untyped_storage()._cdata: kind for kind, tensors in held.items() for tensor in tensors}

    def _described(self, ledger: Ledger, start: int, owned: dict[int, str], param: Tensor) -> _Update | None:
        """None for a call that keeps or frees anything else: it must run each time."""
        changes: list[tuple[int | str, int]] = []
        numbers: dict[Life, int] = {}
        made_by: dict[int, str] = {}
        for life, change in ledger.changes[start:]:
            if life.birth >= start and not life.alive:
                number = numbers.setdefault(life, len(numbers))
                made_by[number] = life.made_by
                changes.append((number, change))
            elif life.key in owned:
                changes.append((owned[life.key], change))
            else:
                return None
        projected = self._optimizer.projected.get(param)
        return _Update(
            param, changes, made_by, None if projected is None else (projected.shape, projected.dtype)
        )

    def _repeat(self, update: _Update, ledger: Ledger, param: Tensor, group: dict[str, Any]) -> None:
        optimizer, lives = self._optimizer, dict[int, Life]()
        for kind, change in update.changes:
            if isinstance(kind, int):
                _write_again(ledger, lives, kind, change, update.made_by[kind])
            elif kind == STATE:
                make_state_(optimizer, param, group)
            elif kind == GRADIENT:
                drop_grad_(param)
            elif change < 0:
                optimizer.projected.pop(param, None)
            else:
                assert update.projected is not None
                shape, dtype = update.projected
                optimizer.projected[param] = torch.empty(shape, dtype=dtype, device=param.device)
        know_as_(optimizer, param, group, like=update.like)


def _write_again(ledger: Ledger, lives: dict[int, Life], number: int, change: int, made_by: str) -> None:
    if number not in lives:
        lives[number] = ledger.born(change, "temporary", made_by=made_by)
    elif lives[number].nbytes + change == 0:
        ledger.died(lives[number])
    else:
        ledger.resized(lives[number], lives[number].nbytes + change)
