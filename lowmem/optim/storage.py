"""How a slot of state is kept between steps: the codec between float32 and memory.

A rule never knows. The engine asks for a slot (or a flat slice of it) as float32 and gives it back;
every tensor involved is a plain tensor under a string key, so checkpoints load with
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem.numerics.rounding import bf16_stochastic
from lowmem.optim.rule import Role, Slot

WHOLE = slice(None)

FORMATS: dict[Role, tuple[str, ...]] = {
    "moment": ("param", "fp32", "bf16"),
    "variance": ("param", "fp32", "bf16"),
    "basis": ("param", "fp32", "bf16"),
}
"""What a recipe may choose for each role; `param` follows the parameter's dtype, as torch does."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Float:
    """Plain floating point: one tensor under the slot's own name."""

    def __init__(self, dtype: torch.dtype, *, stochastic: bool):
        self.dtype = dtype
        self.stochastic = stochastic and dtype == torch.bfloat16

    def allocate(self, slot: Slot, device: torch.device) -> Tensor:
        return torch.zeros(slot.shape, dtype=self.dtype, device=device)

    def nbytes(self, slot: Slot) -> int:
        return math.prod(slot.shape) * self.dtype.itemsize

    def load(self, stored: Tensor, part: slice = WHOLE) -> Tensor:
        """The slot, or a flat slice of it, as float32; the memory itself where it already is float32."""
        if part == WHOLE:
            return stored.float()
        return stored.view(-1)[part].float()

    def save_(self, stored: Tensor, value: Tensor, part: slice, generator: torch.Generator | None) -> None:
        """Keep `value`; without a generator it is rounded to nearest."""
        target = stored if part == WHOLE else stored.view(-1)[part]
        if _is_same_memory(target, value):
            return
        target.copy_(value if generator is None or not self.stochastic else bf16_stochastic(value, generator))


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Asked of the storages and not of their addresses, which tensors in a simulation do not have."""
    return (
        one.dtype == other.dtype
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
    )


def storage_for(role: Role, formats: Mapping[str, str], param_dtype: torch.dtype) -> Float:
    """The codec for a slot of `role`, given the group's `storage` setting.

    Moments kept in bfloat16 are rounded stochastically: with beta2 = 0.999 a step changes the second
    moment by a thousandth, which rounding to nearest would lose for ever.
    """
    if role == "scalar":
        return Float(torch.float32, stochastic=False)
    chosen = formats.get(role, "param")
    dtype = param_dtype if chosen == "param" else _DTYPES[chosen]
    return Float(dtype, stochastic=role != "basis")


def accumulator_dtype(chosen: str, param_dtype: torch.dtype) -> torch.dtype:
    """What projected gradients are added up in."""
    return param_dtype if chosen == "param" else {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]


class LoadedState(Mapping[str, Tensor]):
    """A parameter's state as the rule sees it: float32, loaded when asked for, optionally one flat slice."""

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        codecs: Mapping[str, Float],
        slots: Mapping[str, Slot],
        part: slice,
    ):
        self._stored, self._codecs, self._slots, self._part = stored, codecs, slots, part

    def __getitem__(self, name: str) -> Tensor:
        return self._codecs[name].load(self._stored[name], _part_of(self._slots[name], self._part))

    def __iter__(self):
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def save_(self, values: Mapping[str, Tensor], generator: torch.Generator | None) -> None:
        for name, value in values.items():
            self._codecs[name].save_(
                self._stored[name], value, _part_of(self._slots[name], self._part), generator
            )


def _part_of(slot: Slot, part: slice) -> slice:
    """Scalars are never sliced: every slice of an element rule sees the same number."""
    return WHOLE if slot.role == "scalar" else part
