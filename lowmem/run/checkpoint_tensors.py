"""Write safetensors tensor by tensor, so that a device's weights pass through the host a few MiB at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 2**25
_ALIGNMENT_BYTES = 8  # the header ends at such a border, as the format's own writer makes it

_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order that a file has them, wide values first, so that each tensor lies aligned."""


@dataclass(frozen=True)
class Streamed:
    """A tensor to be written whose values need not be there at once. `pieces` gives them in order, in `dtype`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """The file that `safetensors.torch.save_file` writes of `tensors`, from whatever device they are on.

    Needs at most PIECE_BYTES of the host's memory for a tensor on another device, and a copy of the largest
    tensor that is not contiguous. Tensors that share memory are written once each.

    Raises ValueError for a dtype that the format does not know, OSError when the disk does not take it.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: safetensors holds no {tensor.dtype} tensor of layout {tensor.layout}")
    streamed = {
        name: Streamed(tensor.dtype, tuple(tensor.shape), partial(_pieces, tensor))
        for name, tensor in tensors.items()
    }
    write_streamed(streamed, path, metadata)


def write_streamed(
    tensors: Mapping[str, Streamed], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_safetensors` for tensors that are made piece by piece while they are written."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors holds no {tensor.dtype} tensor")
    rank = {dtype: place for place, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        end = begin + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with Path(path).open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            written = 0
            for piece in tensors[name].pieces():
                data = piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data
                _write_all(file.fileno(), data)
                written += data.nbytes
                del piece, data  # before the next one is made
            assert written == tensors[name].nbytes, f"{name}: its pieces are not the whole tensor"


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().view(-1)
    values = max(1, PIECE_BYTES // tensor.dtype.itemsize)
    for begin in range(0, flat.numel(), values):
        yield flat[begin : begin + values].cpu()


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
