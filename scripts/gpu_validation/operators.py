"""What single operators take beside their tensors on a GPU, against the allowance of lowmem/memory/workspaces.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from lowmem.memory.ledger import rounded
from lowmem.memory.simulate import Simulation
from lowmem.memory.tracker import ByteTracker
from lowmem.memory.workspaces import CUBLAS_BYTES, cuda_workspace_bytes

Prepared = Callable[[], tuple[Tensor, ...]]
"""Runs the operator on inputs that exist already and returns what it made."""


@dataclass(frozen=True)
class Operator:
    """`prepare(device)` makes the inputs and returns the call."""

    name: str
    what: str
    prepare: Callable[[str], Prepared]


def measure_operators(*, on_cuda: bool, small: bool) -> Iterator[dict[str, Any]]:
    """A row for each operator, as soon as it is known; `measured_bytes` is None without a GPU.

    Rows of cuBLAS are what the first products of a process keep for good, so they come first.
    """
    if on_cuda:
        try:
            yield from _kept_by_cublas()
        except Exception as error:
            yield {"operator": "first product of a process", "what": "", "reason": _explained(error)}
    for operator in operators(small=small):
        row: dict[str, Any] = {"operator": operator.name, "what": operator.what, "kept_bytes": None}
        try:
            row["planned_bytes"] = planned_bytes(operator)
            row["measured_bytes"] = None
            if on_cuda:
                row |= _measured_on_cuda(operator)
        except Exception as error:  # an operator that a build of torch lacks leaves the others their rows
            row["reason"] = _explained(error)
        yield row


def operators(*, small: bool) -> list[Operator]:
    """Those of an optimizer step and of attention, `small` ones for a rehearsal."""
    div = 32 if small else 1
    f32, bf16 = torch.float32, torch.bfloat16
    found = [_product(4096 // div, dtype) for dtype in (f32, bf16)]
    found += [
        _on_matrix("qr", rows // div, cols // div) for rows, cols in ((2048, 288), (8192, 288), (4096, 1040))
    ]
    found += [
        _on_matrix("svd", rows // div, cols // div) for rows, cols in ((512, 512), (1024, 4096), (2048, 2048))
    ]
    for name in ("eigh", "cholesky"):
        found += [_on_matrix(name, size // div, size // div) for size in (288, 1040, 2048)]
    for heads, shared, width, tokens in ((32, 8, 64, 2048), (32, 32, 128, 2048), (32, 32, 128, 4096)):
        for masked in (False, True):
            found += _attention(heads, shared, width, tokens // div, bf16, masked=masked)
    found += _attention(32, 8, 64, 2048 // div, f32, masked=False)
    return found


def planned_bytes(operator: Operator) -> int:
    """What a simulation has for the operator between its inputs and its results, the allowance included."""
    simulation = Simulation()
    with simulation.tensors():
        run = operator.prepare("cpu")
        with ByteTracker(lambda: (), scratch_bytes=cuda_workspace_bytes) as tracker:
            made = run()
        inputs = sum(nbytes for _, nbytes in tracker.ledger.residents)
        return tracker.fullest().peak_bytes - inputs - _bytes_of(made)


def _measured_on_cuda(operator: Operator) -> dict[str, int]:
    run = operator.prepare("cuda")
    made = run()  # what libraries make once is there from now on
    del made
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = run()
    torch.cuda.synchronize()
    results = _bytes_of(made)
    return {
        "measured_bytes": torch.cuda.max_memory_allocated() - before - results,
        "kept_bytes": torch.cuda.memory_allocated() - before - results,
    }


def _kept_by_cublas() -> Iterator[dict[str, Any]]:
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    leaf = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(product, leaf, torch.ones_like(weight))

    product = torch.empty(0)
    for name, planned in (("forward", CUBLAS_BYTES), ("backward", 0), ("with a bias", 0), ("again", 0)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        if name == "forward":
            product = leaf @ weight
            made: tuple[Tensor, ...] = (product,)
        elif name == "backward":
            made = backward()
        else:
            made = (linear(weight, weight, bias if name == "with a bias" else None),)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - _bytes_of(made)
        yield {
            "operator": f"first product of a process, {name}",
            "what": "kept for good; 512 x 512 bfloat16",
            "planned_bytes": planned,
            "measured_bytes": kept,
            "kept_bytes": kept,
        }


def _explained(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _bytes_of(tensors: tuple[Tensor, ...]) -> int:
    """As the allocator rounds them; a shared storage counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(rounded(nbytes) for nbytes in storages.values())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product(size: int, dtype: torch.dtype) -> Operator:
    def prepare(device: str) -> Prepared:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: (left @ right,)

    return Operator("matrix product", f"{size} x {size} {_named(dtype)}", prepare)


def _on_matrix(name: str, rows: int, cols: int) -> Operator:
    def prepare(device: str) -> Prepared:
        matrix = torch.randn(rows, cols, device=device)
        if name == "qr":
            return lambda: tuple(torch.linalg.qr(matrix))
        if name == "svd":
            return lambda: tuple(torch.linalg.svd(matrix, full_matrices=False))
        positive = matrix @ matrix.mT / rows + torch.eye(rows, device=device)
        if name == "eigh":
            return lambda: tuple(torch.linalg.eigh(positive))
        return lambda: (torch.linalg.cholesky(positive),)

    return Operator(name, f"{rows} x {cols} float32", prepare)


def _attention(
    heads: int, shared: int, width: int, tokens: int, dtype: torch.dtype, *, masked: bool
) -> list[Operator]:
    """Forward and backward; with a mask the keys and values are repeated first, as transformers does."""
    kept = heads if masked else shared

    def inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query, key, value = (
            torch.randn(1, count, tokens, width, device=device, dtype=dtype).requires_grad_()
            for count in (heads, kept, kept)
        )
        mask = (
            torch.ones(tokens, tokens, device=device, dtype=torch.bool).tril()[None, None] if masked else None
        )
        return query, key, value, mask

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=kept != heads
        )

    def forward(device: str) -> Prepared:
        query, key, value, mask = inputs(device)

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(query, key, value, mask),)

        return run

    def backward(device: str) -> Prepared:
        query, key, value, mask = inputs(device)
        result = attend(query, key, value, mask)
        upstream = torch.ones_like(result)
        return lambda: torch.autograd.grad(result, (query, key, value), upstream, retain_graph=True)

    what = (
        f"{heads}/{kept} heads of {width}, {tokens} tokens, {_named(dtype)}, {'mask' if masked else 'causal'}"
    )
    return [
        Operator("attention forward", what, forward),
        Operator("attention backward", what, backward),
    ]
