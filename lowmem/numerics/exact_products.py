"""Float32 matrix products made in float32, whatever a program chose for its speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep CUDA from rounding the factors of float32 products to TF32's eleven bits while this is open.

    For sums that are differences of large numbers: a Gram matrix of rounded factors has eigenvalues that are all
    noise below a thousandth of its largest.
    """
    matmul = torch.backends.cuda.matmul
    chosen = matmul.fp32_precision
    if chosen != "tf32":
        yield
        return
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name the old setting where the new one was used
        legacy = None
    if legacy is None:
        matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is None:
            matmul.fp32_precision = chosen
        else:
            torch.set_float32_matmul_precision(legacy)
