"""The weights of a model that is divided over processes, brought together one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowmem.numerics.held_weights import numel_of


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Have transformers load a model whole where ZeRO-3 was launched, and not divided already.

    What is tried out on a model before it is trained needs all of it; DeepSpeed divides it afterwards.
    """
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def whole_state_dict(model: nn.Module, *, keeps: bool, only_trained: bool = False) -> dict[str, Tensor]:
    """`model.state_dict()` on the host, with whole tensors, where `keeps`; elsewhere {}.

    only_trained: of parameters that require gradients, without buffers.

    Every process must call it. One parameter at a time is whole on the devices. A tied one stands under each of its
    names.
    """
    persistent = set(
        model.state_dict()
    )  # by every process: FSDP2 divides again what a forward pass left whole
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if only_trained and not param.requires_grad:
            continue
        if id(param) not in copies:
            with _gathered(param):
                whole = param.full_tensor() if isinstance(param, DTensor) else param
                copies[id(param)] = whole.detach().to("cpu", copy=True) if keeps else param.new_empty(0)
        if keeps:
            found[name] = copies[id(param)]
    if keeps and not only_trained:
        found |= {name: value.cpu() for name, value in model.named_buffers() if name in persistent}
    return found


def state_dict_in_small(model: nn.Module, *, only_trained: bool = False) -> dict[str, Tensor]:
    """What `whole_state_dict` gives, with one value for each tensor and nothing brought together.

    Every process must call it, though no values travel.
    """
    persistent = set(model.state_dict())
    copies: dict[int, Tensor] = {}
    found = {
        name: copies.setdefault(id(param), torch.zeros(1, dtype=param.dtype))
        for name, param in model.named_parameters(remove_duplicate=False)
        if param.requires_grad or not only_trained
    }
    if not only_trained:
        found |= {
            name: torch.zeros(1, dtype=value.dtype)
            for name, value in model.named_buffers()
            if name in persistent
        }
    return found


def whole_numel(param: Any) -> int:
    """Values of the whole weight, whatever this process has of it."""
    return int(param.ds_numel) if hasattr(param, "ds_numel") else numel_of(param)


def _gathered(param: Any) -> Any:
    if not hasattr(param, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([param])
