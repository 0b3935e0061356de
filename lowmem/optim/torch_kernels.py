"""Where torch's own fused kernels compute the same step: no temporaries, one pass over memory.

They apply when the parameter, its gradient and its state are plain contiguous tensors of one dtype and
nothing is rounded stochastically. The result differs from the rule's own arithmetic by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowmem.numerics.row_gradients import RowGradient
from lowmem.optim.rule import Rule, Slot
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.momentum import Momentum
from lowmem.optim.rules.snr_scaled import SnrScaledMomentum
from lowmem.optim.writeback import matching_rows


def step_with_torch_(
    rule: Rule,
    param: Tensor,
    grad: Tensor | RowGradient,
    state: Mapping[str, Tensor],
    *,
    step: int,
    lr: float,
    weight_decay: float,
) -> bool:
    """Make the whole step in place and return True, or touch nothing and return False."""
    if isinstance(grad, RowGradient):
        slots = rule.slots(tuple(param.shape))
        return type(rule) in _KERNELS and all(
            step_with_torch_(
                rule,
                weight,
                values,
                _flat_part(state, slots, part),
                step=step,
                lr=lr,
                weight_decay=weight_decay,
            )
            for part, weight, values in matching_rows(param, grad)
        )
    kernel = _KERNELS.get(type(rule))
    slots = rule.slots(tuple(param.shape))
    if kernel is None or not _plain(
        param, grad, *(state[name] for name, slot in slots.items() if slot.role != "scalar")
    ):
        return False
    kernel(rule, param, grad, state, step, lr, weight_decay)
    return True


def _flat_part(state: Mapping[str, Tensor], slots: Mapping[str, Slot], part: slice) -> dict[str, Tensor]:
    return {
        name: state[name] if slot.role == "scalar" else state[name].view(-1)[part]
        for name, slot in slots.items()
    }


def _plain(param: Tensor, *others: Tensor) -> bool:
    return param.is_contiguous() and all(
        each.dtype == param.dtype and each.device == param.device and each.is_contiguous() for each in others
    )


def _adamw(
    rule: Adam, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, lr: float, wd: float
) -> None:
    torch._fused_adamw_(
        [param],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [torch.full((), float(step), device=param.device)],
        lr=lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=wd,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )


def _sgd(
    rule: Momentum, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, lr: float, wd: float
) -> None:
    if wd:
        param.mul_(1 - lr * wd)
    _momentum_step_(param, grad, state, step == 1, rule.momentum, rule.dampening, rule.nesterov, lr)


def _sgd_sai(
    rule: SnrScaledMomentum,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    wd: float,
) -> None:
    if wd:
        param.mul_(1 - lr * wd)
    # The rate is a tensor, so that the device is never asked for the ratio's value.
    scaled_lr = state["gsnr"] * (lr / rule.normalizer)
    is_first = step == 1 and rule.starts_whole
    _momentum_step_(param, grad, state, is_first, rule.momentum, rule.momentum, False, scaled_lr)


def _momentum_step_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    is_first: bool,
    momentum: float,
    dampening: float,
    nesterov: bool,
    lr: float | Tensor,
) -> None:
    """torch's fused SGD on one tensor, its coupled weight decay left out."""
    torch._fused_sgd_(
        [param],
        [grad],
        [state["momentum_buffer"]] if momentum else [],
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=False,
        is_first_step=is_first,
    )


_KERNELS: dict[type[Rule], Callable[..., None]] = {Adam: _adamw, Momentum: _sgd, SnrScaledMomentum: _sgd_sai}
