"""The tensors of a training step whose part is known: weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.memory.ledger import ALLOCATION_BYTES, Part, rounded
from lowmem.numerics.held_weights import grad_of
from lowmem.numerics.packed_weights import scales_of


def owned_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[Part, Tensor, str]]:
    """(part, tensor, name) of all that the model and the optimizer hold now; one storage may come several times."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    if optimizer is not None:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            names.setdefault(param, "a parameter outside the model")
    for param, name in names.items():
        yield "weights", param, name
        for scale, tensor in scales_of(param):
            yield "weights", tensor, f"{scale} of {name}"
    for name, buffer in model.named_buffers():
        yield "weights", buffer, name
    for param, name in names.items():
        if (grad := grad_of(param)) is not None:
            yield "gradients", grad, f"gradient of {name}"
    if optimizer is not None:
        for param, projected in getattr(optimizer, "projected", {}).items():
            yield "gradients", projected, f"projected gradient of {names.get(param, 'a parameter')}"
        for owner, state in optimizer.state.items():
            for tensor, slot in _tensors_in(state):
                yield "optimizer_state", tensor, f"{slot} of {names.get(owner, 'the optimizer')}".lstrip()


def owned_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> dict[Part, int]:
    """Bytes of these tensors on `device` as its allocator rounds them; a shared storage counts once."""
    seen: set[int] = set()
    total: dict[Part, int] = {"weights": 0, "gradients": 0, "optimizer_state": 0}
    for part, tensor, _ in owned_tensors(model, optimizer):
        for storage in storages_of(tensor):
            if tensor.device == device and storage._cdata not in seen:
                seen.add(storage._cdata)
                total[part] += rounded(storage.nbytes(), ALLOCATION_BYTES)
    return total


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """One storage of an ordinary tensor, two of a sparse one (indices and values).

    Raises ValueError for a layout without storages, such as mkldnn's.
    """
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    raise ValueError(f"the bytes of {tensor.layout} tensors cannot be counted")


def _tensors_in(value: Any, name: str = "") -> Iterator[tuple[Tensor, str]]:
    """(tensor, key) inside mappings, lists and tuples, which is how optimizers keep their state."""
    if isinstance(value, Tensor):
        yield value, name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors_in(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner, name)
