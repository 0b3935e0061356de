"""A matrix in int8 that is trained in place, and the empty parameter that stands for it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.numerics.int8_groups import dequantize_rows, groups_in, quantize_rows
from lowmem.numerics.tiles import TILE_NUMEL

GROUP = 256
"""Values that share a scale."""
SCALE_DTYPES = (torch.float32, torch.bfloat16)


class Int8Weight:
    """What stands behind a handle: the codes and scales of `module`, and the gradient of the weight.

    codes: (rows, columns) int8; scales: (rows, ceil(columns / group)) float32 or bfloat16. 1 + 4 / group bytes a
    value, 1.016 with the usual groups of 256. The weight's dtype towards everything else is the handle's.
    """

    def __init__(self, module: Int8Module):
        self._module = weakref.ref(module)
        self.grad: Tensor | None = None
        self.trainer: Any = None

    def __reduce__(self) -> Any:
        return type(None), ()  # its module makes another when it is copied or unpickled

    @property
    def module(self) -> Int8Module:
        module = self._module()
        assert module is not None, "the module of an int8 weight is gone, and its weight with it"
        return module

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight_codes.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored())

    def stored(self) -> tuple[Tensor, Tensor]:
        return self.module.weight_codes, self.module.weight_scales

    def load_rows(self, rows: slice) -> Tensor:
        module = self.module
        return dequantize_rows(module.weight_codes[rows], module.weight_scales[rows], module.group_size)

    def store_rows_(self, rows: slice, wide: Tensor, generator: torch.Generator | None) -> None:
        module = self.module
        codes, scales = quantize_rows(wide, module.group_size, module.weight_scales.dtype, generator)
        module.weight_codes[rows] = codes
        module.weight_scales[rows] = scales

    def row_slices(self, multiple_of: int = 1) -> Iterator[slice]:
        rows, columns = self.shape
        unit = multiple_of // math.gcd(multiple_of, columns)
        step = max(unit, TILE_NUMEL // max(1, columns) // unit * unit)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def add_grad_(self, grad: Tensor) -> None:
        """Add the gradient of one use of the weight.

        Raises RuntimeError when no optimizer of lowmem's has the handle: others would never use the gradient.
        """
        if self.trainer is None or (isinstance(self.trainer, weakref.ref) and self.trainer() is None):
            raise RuntimeError(
                f"an int8 weight of {self.shape} is to be trained, and no optimizer of lowmem's has its parameter; "
                "others see an empty one and would leave it as it is. Make the optimizer with lowmem.build_optimizer "
                "or lowmem.optim before the backward pass, or freeze the weight with requires_grad_(False)."
            )
        self.grad = grad if self.grad is None else self.grad.add_(grad)


class Int8Module(nn.Module):
    """A module whose matrix is in int8: buffers `weight_codes` and `weight_scales`, and `weight`, their handle.

    `weight` is an empty parameter of the dtype that the module computes in. `state_dict` holds codes and scales and
    no `weight`; loading a float `weight` quantises it. Codes and scales keep their dtypes under `.to()`,
    `.bfloat16()` and the like, and copies have handles of their own.
    """

    weight_codes: Tensor
    weight_scales: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        group_size: int = GROUP,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; it must be at least 1, usually {GROUP}")
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype is {scale_dtype}; it must be one of {SCALE_DTYPES}")
        super().__init__()
        self.group_size = group_size
        self.register_buffer(
            "weight_codes", torch.zeros(rows, columns, dtype=torch.int8, device=device), persistent=True
        )
        groups = groups_in(columns, group_size)
        self.register_buffer("weight_scales", torch.zeros(rows, groups, dtype=scale_dtype, device=device))
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
        self._bind()

    def _bind(self) -> None:
        """Make `weight` the handle of this module's codes, unless it is another module's."""
        self.weight.held_weight = Int8Weight(self)  # type: ignore[attr-defined]

    @property
    def held(self) -> Int8Weight:
        return self.weight.held_weight  # type: ignore[attr-defined]

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """Take over a float matrix, a few rows at a time; one without values (meta, fake) changes nothing.

        Raises ValueError for another shape.
        """
        if tuple(weight.shape) != tuple(self.weight_codes.shape):
            raise ValueError(
                f"the weight is {tuple(weight.shape)}, and this module holds one of {tuple(self.weight_codes.shape)}"
            )
        if weight.is_meta or isinstance(weight, FakeTensor):
            return
        for rows in self.held.row_slices():
            wide = torch.empty(weight[rows].shape, dtype=torch.float32, device=self.weight_codes.device)
            self.held.store_rows_(rows, wide.copy_(weight[rows]), None)

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight as a float tensor, by default in the handle's dtype; for exports and tests."""
        whole = torch.empty(
            self.weight_codes.shape, dtype=dtype or self.weight.dtype, device=self.weight_codes.device
        )
        for rows in self.held.row_slices():
            whole[rows] = self.held.load_rows(rows).to(whole.dtype)
        return whole

    # ---------------------------------------------------------------- what torch does to modules

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Module:
        """As torch's, but a change of dtype reaches the handle only; codes and scales follow to another device."""
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        held, handle = self.held, self.weight
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            changed = self._buffers[name]
            if changed is not None and changed.dtype != dtype:
                original = before[name]
                assert original is not None
                # Moved from the original: a round trip through another dtype would not give the bits back.
                self._buffers[name] = original.to(changed.device)
        if self.weight is not handle:
            self.weight.held_weight = held  # type: ignore[attr-defined]
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "weight", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        given = {**state_dict, prefix + "weight": self.weight.detach()}
        if weight is not None and weight.is_floating_point() and weight.numel():
            self.quantize_(weight)
            given[prefix + "weight_codes"] = self.weight_codes
            given[prefix + "weight_scales"] = self.weight_scales
        super()._load_from_state_dict(given, prefix, metadata, strict, *lists)
