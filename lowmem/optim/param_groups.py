"""A param group of the engine: its settings filled in and checked, its parameters looked at."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowmem.numerics.held_weights import shape_of
from lowmem.optim.settings import did_you_mean, settings_of

if TYPE_CHECKING:
    from lowmem.optim.engine import LowMemOptimizer

log = logging.getLogger("lowmem")

_FOREIGN_KEYS = {"params", "param_names", "algorithm", "name", "swa_lr"}
_SHARED_SETTINGS = ("lr", "weight_decay", "rounding", "seed")
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def filled_group(
    owner: type[LowMemOptimizer], given: dict[str, Any], defaults: dict[str, Any], *, of_own_algorithm: bool
) -> dict[str, Any]:
    """`given` with every setting of `owner`: the optimizer's `defaults` where they share it, else the algorithm's.

    Raises ValueError for a setting that `owner` lacks and for a value out of range.
    """
    settings = settings_of(owner)
    for name in given:
        if name not in settings and name not in _FOREIGN_KEYS | _SCHEDULER_KEYS:
            raise ValueError(
                f"{owner.algorithm} has no setting {name!r}{did_you_mean(name, settings)} "
                f"Settings: {', '.join(settings)}"
            )
    shared = settings if of_own_algorithm else _SHARED_SETTINGS
    own = {name: setting.default for name, setting in settings.items()}
    filled = {**own, **{name: defaults[name] for name in shared}, "algorithm": owner.algorithm, **given}
    for name, setting in settings.items():
        if setting.kind == "storage" and isinstance(filled[name], Mapping | None) and setting.default:
            filled[name] = {**setting.default, **(filled[name] or {})}
        value = filled[name]
        if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if problem := setting.problem(value):
            raise ValueError(f"{owner.algorithm}: {name} {problem}")
    return filled


def drop_settings_of_others_(owner: type[LowMemOptimizer], filled: dict[str, Any]) -> None:
    """torch fills in the defaults of the optimizer's own algorithm, which another one does not have."""
    for name in set(filled) - set(settings_of(owner)) - _FOREIGN_KEYS - _SCHEDULER_KEYS:
        del filled[name]


def refuse_sharded(param: Tensor) -> None:
    """Raises ValueError for a DTensor: a rule would take this process' rows for the matrix."""
    if hasattr(param, "device_mesh"):
        raise ValueError(
            "a parameter is divided over processes. Call lowmem.run.layouts.attach.attach_to_fsdp2(optimizer, model) "
            "once, so that matrices are put together, or train by recipe."
        )


def check_params(owner: type[LowMemOptimizer], params: Iterable[Tensor], group: dict[str, Any]) -> None:
    """Raises ValueError for a parameter that cannot be trained; logs what a user should know, once a kind."""
    params = list(params)
    remarks: dict[str, int] = {}
    for param in params:
        if param.is_complex() or not param.is_floating_point():
            raise ValueError(f"{owner.algorithm} needs real floating-point parameters, found {param.dtype}")
        owner.rule(group, shape_of(param))
        if (remark := owner.remark(group, shape_of(param))) is not None:
            remarks[remark] = remarks.get(remark, 0) + 1
    for remark, count in remarks.items():
        log.warning("%s: %s (%d of %d parameters)", owner.algorithm, remark, count, len(params))
