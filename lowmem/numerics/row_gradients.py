"""Gradients of matrices that are made some rows at a time, when they are asked for, and are never held whole.

An output head and an embedding have the largest gradients of a model, and both can be made again from little: the
head's from the hidden states, the embedding's from the tokens and the gradient of what was looked up. Who can use
a gradient by rows puts a `RowTaker` beside the parameter; each use of the weight that knows of it leaves its part
there, and the graph ends in the taker's empty `handle`, whose hook runs when all parts are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.numerics.held_weights import grad_of, held_weight, numel_of


class RowGradient:
    """The gradient of a matrix (m, n): `gradient[rows]` makes the rows of a slice, anew at each call.

    Rows that were made may be changed in place. The weight's rows must not have changed yet when they are made.
    """

    is_sparse = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    def __getitem__(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def magnitude(self) -> Tensor:
        """A scalar that is finite only where the whole gradient is, without making it."""
        raise NotImplementedError

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)


def wide_norm(x: Tensor) -> Tensor:
    """The 2-norm of all entries, in float32 or wider."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


class EmbeddingRows(RowGradient):
    """Of the table that `ids` were looked up in: row v is the sum of `dy` over the tokens with id v."""

    def __init__(self, ids: Tensor, dy: Tensor, rows: int, padding_idx: int | None):
        super().__init__((rows, dy.shape[-1]), dy.dtype, dy.device)
        self._ids, self._dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        self._padding_idx = -1 if padding_idx is None else padding_idx

    def __getitem__(self, rows: slice) -> Tensor:
        count, ids = rows.stop - rows.start, self._ids
        is_here = (ids >= rows.start) & (ids < rows.stop) & (ids != self._padding_idx)
        # Tokens of other rows go to one row more, which torch leaves out as it does a padding token.
        places = torch.where(is_here, ids - rows.start, count)
        return torch.ops.aten.embedding_dense_backward(self._dy, places, count + 1, count, False)[:count]

    def magnitude(self) -> Tensor:
        return wide_norm(self._dy)


class SumOfRows(RowGradient):
    """Of a weight that is used several times; `whole` is the part of uses that made all rows at once."""

    def __init__(self, parts: Sequence[RowGradient], whole: Tensor | None):
        first = parts[0]
        super().__init__(first.shape, first.dtype, first.device)
        self._parts, self._whole = parts, whole

    def __getitem__(self, rows: slice) -> Tensor:
        total = self._parts[0][rows]
        for part in self._parts[1:]:
            total.add_(part[rows])
        return total if self._whole is None else total.add_(self._whole[rows])

    def magnitude(self) -> Tensor:
        total = torch.stack([part.magnitude() for part in self._parts]).sum()
        return total if self._whole is None else total + wide_norm(self._whole)


class RowTaker:
    """Stands beside a parameter (`row_taker`) whose gradient may come by rows while `is_open`.

    `handle` is what a use of the weight puts into the graph in the weight's place: an empty tensor, or the parameter
    itself where that is empty already.
    """

    def __init__(self, param: Tensor):
        self.handle = (
            param if held_weight(param) is not None else param.detach().new_empty(0).requires_grad_()
        )
        self.is_open = False
        self.awaited = 0
        """Uses of an ordinary weight in the graph whose parts are not all there yet."""
        self.was_used = False
        """Whether the gradient of this micro-batch was complete and is gone."""
        self.parts: list[RowGradient] = []

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the parameter has none

    def begin(self, *, is_open: bool) -> None:
        """A micro-batch begins."""
        self.is_open, self.awaited, self.was_used = is_open, 0, False
        self.parts.clear()

    def expect(self) -> Tensor:
        """The handle, for a use of the weight that will leave a part here."""
        if held_weight(self.handle) is None:
            self.awaited += 1
        return self.handle

    def drop_(self) -> None:
        """Free what the gradient would be made of."""
        self.parts.clear()
        self.handle.grad = None
        self.awaited, self.was_used = 0, True


def row_taker(param: Tensor) -> RowTaker | None:
    """The taker beside `param`, open or not."""
    return getattr(param, "row_taker", None)


def open_taker(param: Tensor) -> RowTaker | None:
    """The taker that a use of `param` in the graph is to leave its part with, if any."""
    taker = row_taker(param)
    wants = taker is not None and taker.is_open and param.requires_grad and torch.is_grad_enabled()
    return taker if wants else None


def gradient_of(param: Tensor) -> Tensor | RowGradient | None:
    """The gradient of the weight, by rows where a part of it is."""
    taker, whole = row_taker(param), grad_of(param)
    return SumOfRows(taker.parts, whole) if taker is not None and taker.parts else whole


def is_by_rows(param: Tensor) -> bool:
    """Whether the gradient of the weight comes by rows where a step has one micro-batch."""
    return row_taker(param) is not None and numel_of(param) > 0
