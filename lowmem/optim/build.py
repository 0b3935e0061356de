"""An optimizer for a whole model, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lowmem.optim import registry
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.groups import model_groups, parameter_count
from lowmem.optim.settings import did_you_mean, settings_of

DEFAULT_TARGET = ("attn", "mlp")


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    target: Sequence[str] = DEFAULT_TARGET,
    fallback: dict[str, Any] | None = None,
    **settings: Any,
) -> LowMemOptimizer:
    """The optimizer called `name` over every trainable parameter of `model`.

    A matrix algorithm (GaLore) treats the linear layers whose path contains one of `target`; all other
    parameters take `fallback`, {"name": ..., settings}, by default AdamW with the same lr and decay. An
    element-wise algorithm treats every parameter unless a `fallback` is given. Norms and biases are not
    decayed. `settings` are the algorithm's own; an unknown one is an error.

        build_optimizer(model, "galore", lr=1e-4, rank=128, fallback={"name": "adamw", "lr": 5e-5})

    Raises ValueError for an unknown name or setting, a value out of range, a target without a match.
    """
    owner = registry.optimizer_class(name)
    known = settings_of(owner)
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{name} has no setting {key!r}{did_you_mean(key, known)} Settings: {', '.join(known)}"
            )
    uses_target = owner.treats_matrices or fallback is not None
    groups = model_groups(
        model,
        own={"algorithm": name},
        target=tuple(target) if uses_target else None,
        fallback=_fallback_settings(fallback),
    )
    make: Callable[..., LowMemOptimizer] = owner
    return make(groups, lr=lr, **settings)


def _fallback_settings(fallback: dict[str, Any] | None) -> dict[str, Any]:
    chosen = dict(fallback or {"name": "adamw"})
    if "name" not in chosen:
        raise ValueError("fallback needs a name, for example {'name': 'adamw'}")
    name = chosen.pop("name")
    known = settings_of(registry.optimizer_class(name))
    for key in chosen:
        if key not in known:
            raise ValueError(
                f"fallback {name} has no setting {key!r}{did_you_mean(key, known)} Settings: {', '.join(known)}"
            )
    return {"algorithm": name, **chosen}


def describe_groups(optimizer: LowMemOptimizer) -> str:
    """One line a group: its algorithm, tensors, parameters and learning rate."""
    lines = []
    for group in optimizer.param_groups:
        count = parameter_count(group["params"])
        decay = f", weight decay {group['weight_decay']:g}" if group["weight_decay"] else ""
        lines.append(
            f"{group['algorithm']}: {len(group['params'])} tensors, {count:,} parameters, lr {group['lr']:g}{decay}"
        )
    return "\n".join(lines)
