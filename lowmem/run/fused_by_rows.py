"""Update inside backward with the largest gradients, those of the head and the embedding, made by rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import RefusedError
from lowmem.numerics.held_weights import drop_grad_
from lowmem.numerics.row_gradients import RowTaker, gradient_of, row_taker
from lowmem.run.execution import Norms, weakly
from lowmem.run.fused_backward import FusedBackward
from lowmem.run.norms import is_finite
from lowmem.run.row_uses import RowUses
from lowmem.run.second_backward import second_backward


class FusedByRows(FusedBackward):
    """As FusedBackward; a head or an embedding whose rule can take rows is updated a few rows at a time.

    Its gradient is never held whole: each block of rows is made from what the loss and the look-up have kept, used
    and dropped. That happens when every use of the weight has had its turn, for a tied head at the end of backward.
    The input gradient is made before any row is updated. Exact where a step has one micro-batch, on one process,
    without clipping; in other steps these gradients are whole, as all others are.

    Such a gradient is taken for finite where the loss and all it is made of are.
    """

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._weights: dict[Tensor, Tensor] = {}
        """By the handle that stands for each in the graph."""
        self._rows: RowUses | None = None
        if self._processes > 1 or self.max_norm is not None:
            return
        trained = [param for param in self._groups if param.requires_grad and self._takes_rows(param)]
        self._rows = RowUses(model, trained)
        hook = weakly(self._on_all_parts)
        for param, taker in self._rows.takers.items():
            if taker.handle is not param:
                self._weights[taker.handle] = param
                self._handles.append(taker.handle.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        super().detach()
        if self._rows is not None:
            self._rows.remove()

    def begin_micro_batch(self, *, is_first: bool, is_last: bool) -> None:
        super().begin_micro_batch(is_first=is_first, is_last=is_last)
        if self._rows is not None:
            self._rows.begin_micro_batch(is_open=is_first and is_last)

    def on_gradient(self, param: Tensor) -> None:
        taker = row_taker(param)
        if taker is None or not (taker.awaited or taker.parts or taker.was_used):
            super().on_gradient(param)
        elif taker.was_used:
            name = self.optimizer.place_of(param)[0]
            raise RefusedError(
                f"train.head_gradient: auto has used the gradient of {name} before all of it had arrived: the model "
                "uses this weight in another way than as its embedding and its head. Use train.head_gradient: whole."
            )
        elif not taker.awaited:
            self._use_rows(param, taker)

    def finish_backward(self) -> Norms:
        if self._rows is not None:
            self._rows.begin_micro_batch(is_open=False)
        return super().finish_backward()

    def _takes_rows(self, param: Tensor) -> bool:
        return self.optimizer.rule_of(param, self.group_of(param)).takes_rows

    def _on_all_parts(self, handle: Tensor) -> None:
        param = self._weights[handle]
        taker = row_taker(param)
        assert taker is not None
        if taker.was_used:
            raise second_backward(self.mode, self.optimizer.place_of(param)[0])
        with torch.no_grad():
            self._use_rows(param, taker)

    def _use_rows(self, param: Tensor, taker: RowTaker) -> None:
        grad: Any = gradient_of(param)
        if self._drops or not is_finite(grad.magnitude()):
            self.not_finite[param] = None
        else:
            self.optimizer.step_param(param, self.group_of(param))
        drop_grad_(param)
        taker.drop_()
