"""Micro-batches added to a slot of the state as they arrive, so that no gradient waits for the end of its step.

For rules with `accumulates_in`: what such a slot becomes is linear in the step's gradient, so it may be made term by
term. Nothing can be undone, hence a gradient must be known to be of use before it is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem.numerics.held_weights import numel_of, shape_of
from lowmem.optim.codecs import Float
from lowmem.optim.rule import Context, Rule
from lowmem.optim.storage import LoadedState
from lowmem.optim.writeback import parts_of

if TYPE_CHECKING:
    from lowmem.optim.engine import LowMemOptimizer


def accumulates(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> bool:
    """Whether micro-batches of `param` can be added to its state: in floats, not in codes that share a scale."""
    rule = optimizer.rule_of(param, group)
    slot = rule.accumulates_in
    return slot is not None and isinstance(optimizer._codecs(param, group, rule)[slot], Float)


def may_accumulate(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> bool:
    """Whether they can be in the step under way, from its first to its last micro-batch."""
    if numel_of(param) == 0 or not accumulates(optimizer, param, group):
        return False
    # Asking must not make the state: where the answer is no, that waits for the update, which frees a gradient.
    state = optimizer._loaded(param, group) if optimizer.state[param] else {}
    return optimizer.rule_of(param, group).may_accumulate(state, optimizer.coming_context(param, group))


@dataclass(frozen=True)
class Accumulation:
    """One parameter in one step. `state_of` loads a flat slice of its state."""

    rule: Rule
    param: Tensor
    state_of: Callable[[slice], LoadedState]
    ctx: Context

    def add_(self, grad: Tensor, *, is_first: bool, rounding: torch.Generator | None) -> None:
        """Add a micro-batch's gradient; another is to follow, so the weight stays."""
        for part, values, _ in parts_of(self.param, grad):
            state = self.state_of(part)
            state.save_(self.rule.accumulate(values.float(), state, self.ctx, is_first=is_first), rounding)

    def finish_(
        self, grad: Tensor | None, *, lr: float, weight_decay: float, rounding: torch.Generator | None
    ) -> None:
        """Add the last micro-batch's gradient, if it has one, and move the weight by the whole sum."""
        slot = self.rule.accumulates_in
        assert slot is not None
        for part, values, write_part_ in parts_of(self.param, grad):
            state = self.state_of(part)
            changed = (
                {slot: state[slot]}
                if grad is None
                else self.rule.accumulate(values.float(), state, self.ctx, is_first=False)
            )
            direction = self.rule.direction_of(changed[slot], state)
            write_part_(direction, lr=lr, weight_decay=weight_decay, generator=rounding)
            if grad is not None:
                state.save_(changed, rounding)


def accumulation_of(
    optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any], ctx: Context
) -> Accumulation:
    rule = optimizer.rule_of(param, group)
    stored, codecs = optimizer._stored(param, group, rule), optimizer._codecs(param, group, rule)
    slots = rule.slots(shape_of(param))
    return Accumulation(rule, param, lambda part: LoadedState(stored, codecs, slots, part), ctx)
