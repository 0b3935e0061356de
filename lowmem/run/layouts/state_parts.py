"""How a parameter's state is kept, and what of it some rows of a matrix have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.codecs import Codec
from lowmem.optim.optimizer_state import storage_formats
from lowmem.optim.rule import Rule
from lowmem.optim.storage import codec_for


def codecs_of(
    group: Mapping[str, Any], rule: Rule, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Codec]:
    formats = storage_formats(group)
    return {name: codec_for(name, slot, formats, dtype) for name, slot in rule.slots(shape).items()}


class RowsOfState:
    """Where the state of some rows of a matrix lies in that of all of them."""

    def __init__(self, rule: Rule, shape: tuple[int, ...], rows: slice):
        """rule: of the whole matrix, of `shape`."""
        found = rule.on_rows(shape)
        assert found is not None
        self.rule, self.shape = found.rule, (rows.stop - rows.start, shape[1])
        self.whole = rule.slots(shape)
        self._rows, self._all = rows, shape[0]
        self._part = self.rule.slots(self.shape)

    def divides(self, name: str) -> bool:
        """Whether a slot has something of each row, rather than the same in every process."""
        return self._dimension(name) is not None

    def within(self, name: str, whole: Tensor) -> Tensor:
        """The part of a slot that these rows have."""
        dimension = self._dimension(name)
        assert dimension is not None
        return whole.narrow(dimension, self._rows.start, self._rows.stop - self._rows.start)

    def _dimension(self, name: str) -> int | None:
        sides = zip(self.whole[name].shape, self._part[name].shape, strict=True)
        return next((at for at, (whole, part) in enumerate(sides) if whole != part), None)


def numel_of(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
