"""Update inside backward: each parameter is stepped as its gradient is complete, and the gradient is freed."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.held_weights import drop_grad_, grad_of, numel_of
from lowmem.run.execution import Execution, Mode, Norms
from lowmem.run.norms import clip_each_, is_finite


class FusedBackward(Execution):
    """One gradient at a time is alive, through the same `step_param` as at the boundary: the same bits.

    With several micro-batches gradients are added up as usual until the last one, in which each is used and
    freed. No norm of all gradients is ever known, so only `clip: tensor` clips. A parameter whose gradient is not
    finite is left as it is and listed in `not_finite`, which asks the device once a parameter.
    """

    mode: Mode = "fused"
    frees_gradients = True

    def handles(self, param: Tensor) -> bool:
        return True

    def on_gradient(self, param: Tensor) -> None:
        super().on_gradient(param)
        if not self._is_last:
            return
        group = self.group_of(param)
        grad = grad_of(param)
        self._reduce(grad)
        assert grad is not None
        if self._drops or not is_finite(torch.linalg.vector_norm(grad, dtype=torch.float32)):
            self.not_finite.append(param)
            drop_grad_(param)
            return
        del grad
        if self.is_projected(param):
            self.optimizer.project_grad_(param, group, dtype=torch.float32)
        self._clip_one(param)
        self.optimizer.step_param(param, group)
        drop_grad_(param)

    def finish_backward(self) -> Norms:
        """Nothing is left but what the reducer of data parallel training has kept."""
        for param in self._groups:
            if grad_of(param) is not None:
                self._clip_one(param)
        return Norms(None, None)

    def _clip_one(self, param: Tensor) -> None:
        held = self.optimizer.projected.get(param, grad_of(param))
        if self.max_norm is not None and held is not None:
            clip_each_(held, self.max_norm, numel_of(param), self._total_numel)
