"""The gradient of an output head, made some rows of the vocabulary at a time from what the loss has kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowmem.hf.logit_tiles import Elementwise, logit_grad, store_product_
from lowmem.numerics.held_weights import load_rows, shape_of
from lowmem.numerics.row_gradients import RowGradient, wide_norm


class HeadRows(RowGradient):
    """dW_I = dz_I^T x for rows I, where dz_I = scale functions'(...) (exp(z_I - lse) - onehot) and z_I = x W_I^T + b_I.

    Keeps the hidden states and one number a token, in place of V x H values; two matrix products make a row each time
    it is asked for. The log-sum-exp is that of the forward pass, so the rows of I need no others: those may have
    been updated already.
    """

    def __init__(
        self,
        x: Tensor,  # (T, H)
        weight: Tensor,  # (V, H), or the handle of such a weight
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (T,)
        log_sum_exp: Tensor,  # (T,)
        scale: Tensor,  # ()
        *,
        functions: tuple[Elementwise, ...],
        autocast: dict[str, Any],
    ):
        super().__init__(shape_of(weight), weight.dtype, x.device)
        self._x, self._weight, self._labels, self._scale = x, weight, labels, scale
        # The bias may be updated before the weight is.
        self._bias = None if bias is None else bias.detach().clone()
        self._log_sum_exp, self._functions, self._autocast = log_sum_exp, functions, autocast

    def __getitem__(self, rows: slice) -> Tensor:
        made = self._x.new_empty((rows.stop - rows.start, self.shape[1]), dtype=self.dtype)
        with torch.autocast(**self._autocast):
            W = load_rows(self._weight, rows)
            z = linear(self._x, W, None if self._bias is None else self._bias[rows])
            del W
            dz = logit_grad(z, self._functions, self._labels, self._log_sum_exp, rows, self._scale)
            del z
        store_product_(made, dz.T, self._x)
        return made

    def magnitude(self) -> Tensor:
        """Softmax and one-hot are bounded, so what else the gradient is made of says whether it is finite."""
        return (wide_norm(self._x) * self._scale + self._log_sum_exp.sum()).float()
