"""bitsandbytes' 8-bit codes as a format of state. The library is imported where codes are read, written or stepped."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowmem.numerics.int8_blocks import BLOCK
from lowmem.optim.codecs import WHOLE, Blocks
from lowmem.optim.rule import Shape


@dataclass(frozen=True, kw_only=True)
class LibraryBlocks(Blocks):
    """A byte a value and four bytes a block of 256, as in `Int8Blocks`, but codes and levels are the library's.

    A code is the number of one of 256 levels, between -1 and 1 or between 0 and 1, that its block's scale is
    multiplied with. A rule with a kernel of the library takes `blocks` and changes them in place.
    """

    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        return self._tensors(torch.uint8)

    def load(self, stored: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        codes, scales = self.blocks(stored, part)
        levels = code_levels(codes.device, signed=self.signed)
        values = dequantize_blockwise(codes, absmax=scales, code=levels, blocksize=BLOCK)
        return values.view(self.shape) if part == WHOLE else values

    def save_(
        self, stored: Mapping[str, Tensor], value: Tensor, part: slice, generator: torch.Generator | None
    ) -> None:
        """To nearest, with a generator too, for that is what the library does."""
        from bitsandbytes.functional import quantize_blockwise

        codes, scales = self.blocks(stored, part)
        levels = code_levels(codes.device, signed=self.signed)
        made, state = quantize_blockwise(value.reshape(-1), code=levels, blocksize=BLOCK)
        codes.copy_(made)
        scales.copy_(state.absmax)


@functools.cache
def code_levels(device: torch.device, *, signed: bool) -> Tensor:  # (256)  float32
    """What the library's codes stand for: a constant that all parameters share.

    Made outside of any mode, so that one that is made in a simulation has values, too.
    """
    from bitsandbytes.functional import create_dynamic_map

    with _disable_current_modes():
        return create_dynamic_map(signed=signed).to(device)


def refuse_without_bitsandbytes(algorithm: str, *, instead: str) -> None:
    """Raise ValueError, with the command that installs it and what works without, where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{algorithm} needs a package that is not installed: pip install 'bitsandbytes>=0.50'. Or use {instead}, "
            "which needs none."
        )
