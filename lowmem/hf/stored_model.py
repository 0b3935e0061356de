"""The tensors of a model folder as float ones, read and dequantised a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowmem.errors import RecipeError
from lowmem.hf.int8_files import CODES, SCALES
from lowmem.numerics.int8_groups import dequantize_rows, groups_in
from lowmem.run.checkpoint_tensors import PIECE_BYTES, Streamed

FLOATS = ("F64", "F32", "BF16", "F16")
SCALES_STORED = ("F32", "BF16")
# fmt: off
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on


class StoredModel:
    """Open safetensors files. Use as a context."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._open: list[Any] = []
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> StoredModel:
        for file in self._files:
            stored = safe_open(file, framework="pt")
            stored.__enter__()
            self._open.append(stored)
            self._slices |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *exception: Any) -> None:
        for stored in self._open:
            stored.__exit__(*exception)

    def as_float(self, dtype: torch.dtype, *, group: int | None) -> dict[str, Streamed]:
        """Every tensor by name: float ones in `dtype`, int8 codes with their scales as the weight they stand for,
        others as they are. `group`: values that share a scale, None where nothing is int8.

        Raises RecipeError for codes and scales that do not go together; while pieces are made, for a scale that is
        not finite and for a value that is too large for `dtype`.
        """
        found: dict[str, Streamed] = {}
        for name, stored in self._slices.items():
            path, _, kind = name.rpartition(".")
            shape, stored_as = tuple(stored.get_shape()), stored.get_dtype()
            if group is not None and kind == SCALES:
                if f"{path}.{CODES}" not in self._slices:
                    raise RecipeError(f"{name} has no {path}.{CODES} beside it. Copy the files again.")
            elif group is not None and kind == CODES:
                self._check_codes(name, f"{path}.{SCALES}", group)
                pieces = partial(self._dequantized, name, f"{path}.{SCALES}", group, dtype)
                found[f"{path}.weight"] = Streamed(dtype, shape, pieces)
            elif stored_as not in DTYPES:
                raise RecipeError(f"{name} is of {stored_as}, which is not a plain number.")
            else:
                to = dtype if stored_as in FLOATS else DTYPES[stored_as]
                found[name] = Streamed(to, shape, partial(self._converted, name, to))
        return found

    def _check_codes(self, codes: str, scales: str, group: int) -> None:
        if scales not in self._slices:
            raise RecipeError(
                f"{scales} is missing, without which {codes} has no values. Copy the files again."
            )
        shape, of_scales = self._slices[codes].get_shape(), tuple(self._slices[scales].get_shape())
        scales_as = self._slices[scales].get_dtype()
        if self._slices[codes].get_dtype() != "I8" or len(shape) != 2:
            raise RecipeError(f"{codes} is no matrix of int8. Copy the files again.")
        wanted = (shape[0], groups_in(shape[1], group))
        if of_scales != wanted or scales_as not in SCALES_STORED:
            raise RecipeError(
                f"{scales} is {of_scales} of {scales_as}, and groups of {group} need {wanted} of "
                f"{' or '.join(SCALES_STORED)}. Use the config.json that belongs to these files."
            )

    def _dequantized(self, codes: str, scales: str, group: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for rows in self._row_slices(codes):
            of_rows = self._slices[scales][rows]
            if not bool(of_rows.isfinite().all()):
                raise RecipeError(
                    f"{scales} holds values that are not finite: the file is damaged, or its run went wrong."
                )
            yield _fitting(dequantize_rows(self._slices[codes][rows], of_rows, group), dtype, codes)

    def _converted(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        stored = self._slices[name]
        if not stored.get_shape():
            yield _fitting(stored[...], dtype, name)
            return
        for rows in self._row_slices(name):
            yield _fitting(stored[rows], dtype, name)

    def _row_slices(self, name: str) -> Iterator[slice]:
        rows, *others = self._slices[name].get_shape()
        step = max(1, PIECE_BYTES // 4 // max(1, torch.Size(others).numel()))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


def _fitting(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    converted = values.to(dtype)
    if dtype is torch.float16 and bool((converted.isinf() & values.isfinite()).any()):
        raise RecipeError(f"{name} holds values too large for float16. Use --dtype bfloat16.")
    return converted
