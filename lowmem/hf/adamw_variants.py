"""The three ways torch runs AdamW that a memory saving is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamWInBackward(torch.optim.Optimizer):
    """Each parameter has its own fused AdamW, run from a hook as soon as its gradient is complete.

    The gradient is freed there, so `step` has nothing left to do. Clipping and accumulation see no
    gradients: this is a measure of memory, not a way to train with those.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._inner: dict[Tensor, torch.optim.AdamW] = {}
        for group in self.param_groups:
            for param in group["params"]:
                self._inner[param] = torch.optim.AdamW([param], lr=lr, weight_decay=weight_decay, fused=True)
                param.register_post_accumulate_grad_hook(self._step_param)

    def _step_param(self, param: Tensor) -> None:
        inner = self._inner[param]
        inner.step()
        inner.zero_grad()
        self.state[param] = inner.state[param]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "every parameter was updated during backward"


def trained(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def adamw_variants(lr: float, weight_decay: float) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Name -> optimizer of a model."""
    return {
        "adamw_fused": lambda m: torch.optim.AdamW(trained(m), lr=lr, weight_decay=weight_decay, fused=True),
        "adamw_foreach": lambda m: torch.optim.AdamW(
            trained(m), lr=lr, weight_decay=weight_decay, foreach=True
        ),
        "adamw_fused_backward": lambda m: AdamWInBackward(trained(m), lr=lr, weight_decay=weight_decay),
    }
