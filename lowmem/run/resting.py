"""No gradients for parameters that rest: backward ends at the first that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lowmem.numerics.held_weights import drop_grad_
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.registry import optimizer_class


class Resting:
    """Parameters that have state in turn; in some turns their rule may have no use for a gradient.

    From the first micro-batch of a step to its last these do not require gradients. Between steps they do, so that
    who counts trained parameters, wraps the model or evaluates it finds them as they were given.
    """

    def __init__(
        self,
        optimizer: LowMemOptimizer,
        params: Iterable[Tensor],
        group_of: Callable[[Tensor], dict[str, Any]],
    ):
        self._optimizer, self._group_of = optimizer, group_of
        is_sharded = (
            optimizer.steps_in_pieces is not None
        )  # who has made room for all gradients must get them
        self.params = {
            param: None
            for param in params
            if not is_sharded and optimizer_class(group_of(param)["algorithm"]).rests
        }
        """Those of which it is decided here, at each step."""
        self._stopped: list[Tensor] = []
        self._unstoppable: Tensor | None = None

    def begin_step(self) -> None:
        self.end_step()
        self._stopped = [
            param
            for param in self.params
            if param is not self._unstoppable and param.requires_grad and not self._needs_gradient(param)
        ]
        for param in self._stopped:
            param.requires_grad_(False)

    def end_step(self) -> None:
        for param in self._stopped:
            param.requires_grad_(True)
        self._stopped = []

    def leave_to(self, reducer_keeps: Tensor) -> None:
        """Have the gradient of a parameter made in every step, which somebody else waits for."""
        self._unstoppable = reducer_keeps if reducer_keeps in self.params else None

    def drop_gradient_(self) -> None:
        """That of a parameter that rests and was not stopped."""
        if self._unstoppable is not None and not self._needs_gradient(self._unstoppable):
            drop_grad_(self._unstoppable)

    def _needs_gradient(self, param: Tensor) -> bool:
        return self._optimizer.rule_of(param, self._group_of(param)).needs_gradient
