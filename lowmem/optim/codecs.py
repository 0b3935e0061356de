"""The formats that a slot of state is kept in: float, int8 in blocks, int4 in groups.

A codec belongs to one slot. What it keeps are plain tensors under string keys: the slot's own name, and that name
with `_scale` and `_zero` where the format has scales and zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.int4_groups import bytes_for, dequantize_groups, groups_in, quantize_groups_
from lowmem.numerics.int8_blocks import BLOCK, blocks_in, dequantize_blocks, quantize_blocks_
from lowmem.numerics.rounding import bf16_stochastic
from lowmem.optim.rule import Shape

WHOLE = slice(None)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Between float32, which a rule computes in, and what stays in memory between steps."""

    unit: ClassVar[int] = 1
    """Values that are saved together: a flat slice starts and ends at a multiple of it, or at the slot's end."""

    name: str
    shape: Shape

    def around(self, part: slice) -> slice:
        """The smallest slice that may be saved and holds `part`."""
        return slice(
            part.start // self.unit * self.unit, min(-(-part.stop // self.unit) * self.unit, self.numel)
        )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of what is kept, by key. Zeros in all of them stand for a slot of zeros."""
        raise NotImplementedError

    def load(self, stored: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        """The slot in its shape, or a flat slice of it, as float32."""
        raise NotImplementedError

    def save_(
        self, stored: Mapping[str, Tensor], value: Tensor, part: slice, generator: torch.Generator | None
    ) -> None:
        """Keep `value` as the slot or as the slice. Without a generator it is rounded to nearest."""
        raise NotImplementedError

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        return {
            key: torch.zeros(shape, dtype=dtype, device=device)
            for key, (shape, dtype) in self.tensors().items()
        }

    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())


@dataclass(frozen=True, kw_only=True)
class Float(Codec):
    """Plain floating point: one tensor. Loaded is the memory itself where it already is float32."""

    dtype: torch.dtype
    stochastic: bool
    """Whether bfloat16 is rounded stochastically where there is a generator."""

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        return {self.name: (self.shape, self.dtype)}

    def load(self, stored: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        return _part(stored[self.name], part).float()

    def save_(
        self, stored: Mapping[str, Tensor], value: Tensor, part: slice, generator: torch.Generator | None
    ) -> None:
        target = _part(stored[self.name], part)
        if _is_same_memory(target, value):
            return
        rounds = self.stochastic and generator is not None and self.dtype == torch.bfloat16
        target.copy_(bf16_stochastic(value, generator) if rounds else value)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Blocks(Codec):
    """A byte a value and four bytes a block of 256, counted over the flat slot.

    The values of a block share a scale, so that a block cannot be written in halves.
    """

    unit: ClassVar[int] = BLOCK

    signed: bool

    def blocks(self, stored: Mapping[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        """Codes and scales of a flat slice, as they lie in memory."""
        start, stop, _ = part.indices(self.numel)
        keeps_blocks = start % BLOCK == 0 and (stop % BLOCK == 0 or stop == self.numel)
        assert keeps_blocks, f"{self.name}: {start}:{stop} of {self.numel} values cuts a block of {BLOCK}"
        scales = stored[f"{self.name}_scale"][start // BLOCK : blocks_in(stop)]
        return stored[self.name].view(-1)[start:stop], scales

    def _tensors(self, codes: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        scales = ((blocks_in(self.numel),), torch.float32)
        return {self.name: (self.shape, codes), f"{self.name}_scale": scales}


@dataclass(frozen=True, kw_only=True)
class Int8Blocks(Blocks):
    """`numerics.int8_blocks`."""

    stochastic: bool

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        return self._tensors(torch.int8 if self.signed else torch.uint8)

    def load(self, stored: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        values = dequantize_blocks(*self.blocks(stored, part))
        return values.view(self.shape) if part == WHOLE else values

    def save_(
        self, stored: Mapping[str, Tensor], value: Tensor, part: slice, generator: torch.Generator | None
    ) -> None:
        codes, scales = self.blocks(stored, part)
        quantize_blocks_(value.reshape(-1), codes, scales, generator if self.stochastic else None)


@dataclass(frozen=True, kw_only=True)
class Int4Groups(Codec):
    """`numerics.int4_groups`: two codes a byte, and three bytes a group of 128. Loaded and saved whole, to nearest."""

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        groups = (groups_in(self.numel),)
        return {
            self.name: ((bytes_for(self.numel),), torch.uint8),
            f"{self.name}_scale": (groups, torch.bfloat16),
            f"{self.name}_zero": (groups, torch.uint8),
        }

    def load(self, stored: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        assert part == WHOLE, f"{self.name} is kept in int4, which is loaded whole"
        packed, scales, zeros = (stored[key] for key in self.tensors())
        return dequantize_groups(packed, scales, zeros, self.numel).view(self.shape)

    def save_(
        self, stored: Mapping[str, Tensor], value: Tensor, part: slice, generator: torch.Generator | None
    ) -> None:
        assert part == WHOLE, f"{self.name} is kept in int4, which is saved whole"
        packed, scales, zeros = (stored[key] for key in self.tensors())
        quantize_groups_(value.reshape(-1), packed, scales, zeros)


def _part(stored: Tensor, part: slice) -> Tensor:
    return stored if part == WHOLE else stored.view(-1)[part]


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Asked of the storages and not of their addresses, which tensors in a simulation do not have."""
    return (
        one.dtype == other.dtype
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
    )
