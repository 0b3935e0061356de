"""Project in backward: low-rank gradients are added up over micro-batches, whole ones are freed as they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.held_weights import grad_of
from lowmem.numerics.row_gradients import wide_norm
from lowmem.run.execution import Execution, Mode


class ProjectInBackward(Execution):
    """Between the backward pass and the boundary a matrix holds r x n values instead of its m x n gradient.

    A projection is linear, so the sum of projected micro-batches is the projected sum. While a basis is due
    that wants the whole gradient of the step (`refresh_from: boundary`), that matrix keeps its gradient until
    the last micro-batch. Parameters whose rule needs the whole gradient keep theirs until the boundary.
    """

    mode: Mode = "project"
    frees_gradients = True

    def on_gradient(self, param: Tensor) -> None:
        if self._waits_for_whole_gradient(param):
            return
        if self._is_boundary_only:
            self._note_full_norm(param)
        ctx = self.optimizer.coming_context(param, self.group_of(param))
        if self.optimizer.rule_of(param, self.group_of(param)).needs_refresh(ctx):
            self._reduce(grad_of(param))  # all processes fit the same basis
        self.optimizer.project_grad_(param, self.group_of(param))

    def _note_full_norm(self, param: Tensor) -> None:
        grad = grad_of(param)
        assert grad is not None
        squares = wide_norm(grad).square()
        self._full_squares = squares if self._full_squares is None else self._full_squares + squares

    def _full_norm(self) -> Tensor | None:
        """Known where a step has one micro-batch, on one process: norms of parts of a sum do not add up."""
        if self._full_squares is None or self._processes > 1:
            return super()._full_norm()
        squares = [wide_norm(grad).square() for grad in self._whole_gradients()]
        return torch.stack([self._full_squares, *squares]).sum().sqrt()
