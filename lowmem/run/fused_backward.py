"""Update inside backward: each parameter is stepped as its gradient is complete, and the gradient is freed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.numerics.held_weights import drop_grad_, grad_of, numel_of
from lowmem.numerics.row_gradients import wide_norm
from lowmem.optim.micro_batches import may_accumulate
from lowmem.run.execution import Execution, Mode, Norms
from lowmem.run.norms import clip_each_, is_finite


class FusedBackward(Execution):
    """One gradient at a time is alive, through the same `step_param` as at the boundary: the same bits.

    With several micro-batches a gradient is added to the momentum as it arrives and freed, where the rule's momentum
    is linear in it and nothing clips; the last one moves the weight. Elsewhere gradients are added up as usual until
    the last micro-batch, in which each is used and freed. Over processes each micro-batch's gradient is averaged.

    No norm of all gradients is ever known, so only `clip: tensor` clips. A gradient that is not finite is left out
    before it touches anything, and so are all of a micro-batch whose loss is not finite; their parameters are listed
    in `not_finite`. That asks the device once a gradient.
    """

    mode: Mode = "fused"
    frees_gradients = True

    def handles(self, param: Tensor) -> bool:
        return True

    def note_loss(self, loss: Tensor) -> None:
        if self._processes > 1:
            all_finite = torch.isfinite(loss).to(torch.float32)
            dist.all_reduce(all_finite, op=dist.ReduceOp.MIN)  # or one process would drop what another uses
            self._drops = not bool(all_finite)
        else:
            self._drops = not is_finite(loss)

    def on_gradient(self, param: Tensor) -> None:
        super().on_gradient(param)
        group = self.group_of(param)
        adds = self._adds_to_state(param)
        if not (self._is_last or adds):
            return
        grad = grad_of(param)
        self._reduce(grad)
        assert grad is not None
        is_usable = not self._drops and is_finite(wide_norm(grad))
        del grad
        if not is_usable:
            self.not_finite[param] = None
            drop_grad_(param)
        if not self._is_last:
            self.optimizer.accumulate_grad_(param, group)
            return
        if is_usable and self.is_projected(param):
            self.optimizer.project_grad_(param, group, dtype=torch.float32)
        self._clip_one(param)
        self.optimizer.step_param(param, group)
        drop_grad_(param)

    def finish_backward(self) -> Norms:
        """What is left: gradients that the reducer of data parallel training has kept, sums that saw no last one."""
        self._resting.end_step()
        self._resting.drop_gradient_()
        for param in self._groups:
            if grad_of(param) is not None:
                self._clip_one(param)
            elif param in self.optimizer.accumulated:
                self.optimizer.step_param(param, self.group_of(param))
        return Norms(None, None)

    def _adds_to_state(self, param: Tensor) -> bool:
        """Clipping is of the whole step's gradient, and a single micro-batch has nothing to be added to."""
        if self.max_norm is not None or self._is_boundary_only:
            return False
        return may_accumulate(self.optimizer, param, self.group_of(param))

    def _clip_one(self, param: Tensor) -> None:
        held = self.optimizer.projected.get(param, grad_of(param))
        if self.max_norm is not None and held is not None:
            clip_each_(held, self.max_norm, numel_of(param), self._total_numel)
