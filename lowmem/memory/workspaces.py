"""What CUDA's libraries take beside the tensors, as a stated allowance: a count of tensors cannot see it.

| operator | allowance | why |
|---|---|---|
| matrix products | 32 MiB, for good | cuBLAS's workspace as PyTorch sets it on compute capability 9.0; 8.1 MiB before |
| svd | 3 copies of the matrix | a column-major copy, the factors before they are copied out, the solver |
| qr | 2 copies | a column-major copy and the solver |
| eigh | 3 copies | a column-major copy and the divide-and-conquer workspace of two |
| fft | 2 copies of what is transformed | cuFFT's copy where transforms do not lie next to each other, and its own |
| product with a 4-bit matrix | the matrix in the input's dtype | bitsandbytes expands it first for many tokens |
| attention's backward | a float32 copy of the queries, 1 float32 a query and head | flash attention's accumulators |

`scripts/gpu_validate.py` measures the same operators on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowmem.memory.cards import CUBLAS_BYTES

__all__ = ["CUBLAS_BYTES", "cuda_workspace_bytes"]

_FLOAT32 = 4

_COPIES = {
    torch.ops.aten._linalg_svd.default: 3,
    torch.ops.aten.linalg_qr.default: 2,
    torch.ops.aten._linalg_eigh.default: 3,
    torch.ops.aten._fft_r2c.default: 2,
}
_PACKED_PRODUCT = "bitsandbytes::gemm_4bit"
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cuda_workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that `func` takes on CUDA until it returns, beyond its arguments and results."""
    if func in _COPIES:
        matrix: Tensor = args[0]
        return _COPIES[func] * matrix.numel() * matrix.itemsize
    if func.name() == _PACKED_PRODUCT:  # there is no such operator before bitsandbytes is imported
        return math.prod(args[2]) * args[0].itemsize
    if func is _ATTENTION_BACKWARD:
        query: Tensor = args[1]  # (batch, heads, tokens, width)
        return _FLOAT32 * (query.numel() + query.numel() // query.shape[-1])
    return 0
