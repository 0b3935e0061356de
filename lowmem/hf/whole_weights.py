"""The weights of a model that is divided over processes, brought together one at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowmem.numerics.held_weights import numel_of


def whole_state_dict(model: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """`model.state_dict()` on the host, with whole tensors, where `keeps`; elsewhere {}.

    Every process must call it. One parameter at a time is whole on the devices. A tied one stands under each of its
    names.
    """
    persistent = set(
        model.state_dict()
    )  # by every process: FSDP2 divides again what a forward pass left whole
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) not in copies:
            with _gathered(param):
                whole = param.full_tensor() if isinstance(param, DTensor) else param
                copies[id(param)] = whole.detach().to("cpu", copy=True) if keeps else param.new_empty(0)
        if keeps:
            found[name] = copies[id(param)]
    if keeps:
        found |= {name: value.cpu() for name, value in model.named_buffers() if name in persistent}
    return found


def whole_numel(param: Any) -> int:
    """Values of the whole weight, whatever this process has of it."""
    return int(param.ds_numel) if hasattr(param, "ds_numel") else numel_of(param)


def _gathered(param: Any) -> Any:
    if not hasattr(param, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([param])
