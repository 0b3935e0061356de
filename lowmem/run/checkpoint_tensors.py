"""Write safetensors tensor by tensor, so that a device's weights pass through the host a few MiB at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """The file that `safetensors.torch.save_file` writes of `tensors`, from whatever device they are on.

    Needs at most PIECE_BYTES of the host's memory for a tensor on another device, and a copy of the largest
    tensor that is not contiguous. Tensors that share memory are written once each.

    Raises ValueError for a dtype that the format does not know, OSError when the disk does not take it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ValueError(f"{name}: safetensors holds no {tensor.dtype} tensor of layout {tensor.layout}")
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
            _write_tensor(file.fileno(), tensors[name])


def _write_tensor(file: int, tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().view(-1)
    values = max(1, PIECE_BYTES // tensor.dtype.itemsize)
    for begin in range(0, flat.numel(), values):
        piece = flat[begin : begin + values].cpu()
        _write_all(file, piece.view(torch.uint8).numpy().data)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
