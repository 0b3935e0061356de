"""How state is kept between steps: which format a slot has, and the state that a rule sees.

A rule never knows the format. The engine asks for a slot (or a flat slice of it) as float32 and gives it back;
every tensor involved is a plain tensor under a string key, so checkpoints load with
`torch.load(weights_only=True)`.

    format    bytes a value                    kept as
    param     the weight's                     a tensor of the weight's dtype
    fp32      4
    bf16      2
    int8      1 + 4 / 256                      codes, and NAME_scale
    int4      0.5 + 3 / 128   bases only       packed codes, NAME_scale and NAME_zero
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem.optim.codecs import WHOLE, Blocks, Codec, Float, Int4Groups, Int8Blocks
from lowmem.optim.library_codes import LibraryBlocks
from lowmem.optim.rule import Role, Slot, State

__all__ = ["FORMATS", "WHOLE", "LoadedState", "accumulator_dtype", "codec_for"]

FORMATS: dict[Role, tuple[str, ...]] = {
    "moment": ("param", "fp32", "bf16", "int8"),
    "variance": ("param", "fp32", "bf16", "int8"),
    "basis": ("param", "fp32", "bf16", "int8", "int4"),
}
"""What a recipe may choose for each role; `param` follows the parameter's dtype, as torch does."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def codec_for(name: str, slot: Slot, formats: Mapping[str, str], param_dtype: torch.dtype) -> Codec:
    """The codec for a slot called `name`, given the group's `storage` setting.

    Moments kept in bfloat16 or int8 are rounded stochastically: with beta2 = 0.999 a step changes the second
    moment by a thousandth, which rounding to nearest would lose for ever. A basis is written rarely and as a
    whole, so it is rounded to nearest.
    """
    shape = slot.shape
    if slot.role in ("factor", "scalar"):
        return Float(name=name, shape=shape, dtype=torch.float32, stochastic=False)
    if slot.role in ("moment_codes", "variance_codes"):
        return LibraryBlocks(name=name, shape=shape, signed=slot.role == "moment_codes")
    chosen = formats.get(slot.role, "param")
    stochastic = slot.role != "basis"
    if chosen == "int4":
        return Int4Groups(name=name, shape=shape)
    if chosen == "int8":
        return Int8Blocks(name=name, shape=shape, signed=slot.role != "variance", stochastic=stochastic)
    dtype = param_dtype if chosen == "param" else _DTYPES[chosen]
    return Float(name=name, shape=shape, dtype=dtype, stochastic=stochastic)


def accumulator_dtype(chosen: str, param_dtype: torch.dtype) -> torch.dtype:
    """What projected gradients are added up in."""
    return param_dtype if chosen == "param" else {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]


class LoadedState(State):
    """A parameter's state from its storage, optionally one flat slice of it. `rounding` rounds rows that are saved."""

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        codecs: Mapping[str, Codec],
        slots: Mapping[str, Slot],
        part: slice,
        rounding: torch.Generator | None = None,
    ):
        self._stored, self._codecs, self._slots, self._part = stored, codecs, slots, part
        self._rounding = rounding

    def __getitem__(self, name: str) -> Tensor:
        return self._codecs[name].load(self._stored, _part_of(self._slots[name], self._part))

    def __iter__(self):
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def save_(self, values: Mapping[str, Tensor], generator: torch.Generator | None) -> None:
        for name, value in values.items():
            self._codecs[name].save_(self._stored, value, _part_of(self._slots[name], self._part), generator)

    def rows(self, name: str, index: int, rows: slice) -> Tensor:
        codec, part = self._codecs[name], self._flat(name, index, rows)
        wide = codec.around(part)
        values = codec.load(self._stored, wide)[part.start - wide.start : part.stop - wide.start]
        return values.view(-1, codec.shape[-1])

    def save_rows_(self, name: str, index: int, rows: slice, value: Tensor) -> None:
        codec, part = self._codecs[name], self._flat(name, index, rows)
        wide, values = codec.around(part), value.view(-1)
        if wide != part:  # values of other rows in the same blocks stay as they are
            values = codec.load(self._stored, wide)
            values[part.start - wide.start : part.stop - wide.start] = value.view(-1)
        codec.save_(self._stored, values, wide, self._rounding)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        codec = self._codecs[name]
        assert isinstance(codec, Blocks), f"{name} is not kept in codes"
        return codec.blocks(self._stored, self._part)

    def zero_(self, name: str) -> None:
        for key in self._codecs[name].tensors():
            self._stored[key].zero_()

    def _flat(self, name: str, index: int, rows: slice) -> slice:
        """Where rows of a matrix lie in the flat slot."""
        height, width = self._codecs[name].shape[-2:]
        return slice((index * height + rows.start) * width, (index * height + rows.stop) * width)


def _part_of(slot: Slot, part: slice) -> slice:
    """Scalars are never sliced: every slice of an element rule sees the same number."""
    return WHOLE if slot.role in ("factor", "scalar") else part
