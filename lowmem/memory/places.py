"""Tell where in a model a training step is: the module that runs, or the last gradient that is complete."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


def follow_places(model: nn.Module, at: Callable[[str], None]) -> None:
    """Call `at` with the name of each module of `model` that begins and of each gradient that has landed.

    The hooks stay on the model and keep no tensor alive.
    """

    def begins(name: str, module: nn.Module, args: Any) -> None:
        at(name)

    def landed(name: str, param: Tensor) -> None:
        at(f"after the gradient of {name}")

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(begins, name))
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(partial(landed, name))
