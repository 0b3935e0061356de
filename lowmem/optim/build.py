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
    head: dict[str, Any] | None = None,
    groups: Sequence[dict[str, Any]] = (),
    **settings: Any,
) -> LowMemOptimizer:
    """The optimizer called `name` over every trainable parameter of `model`.

    A matrix algorithm (GaLore) treats the linear layers whose path contains one of `target`; all other
    parameters take `fallback`, {"name": ..., settings}, by default AdamW with the same lr and decay. An
    element-wise algorithm treats every parameter unless a `fallback` is given. The output head, and an embedding
    tied to it, take `head` where that is given. Each of `groups`, {"match": [patterns], settings}, takes the parameters
    whose name contains one of its patterns, with `name` for another optimizer. Norms and biases are not decayed. A
    `fallback`, `head` or group of the same algorithm takes from it what it does not say. `settings` are the algorithm's
    own; an unknown one is an error.

        build_optimizer(model, "galore", lr=1e-4, rank=128, fallback={"name": "adamw", "lr": 5e-5})
        build_optimizer(model, "frugal", lr=1e-4, groups=[{"match": ["v_proj", "down_proj"], "density": 0.0}])

    Raises ValueError for an unknown name or setting, a value out of range, a target or pattern without a match, a
    parameter that two groups claim.
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
        fallback=_settings_of_other("fallback", fallback or {"name": "adamw"}),
        head=None if head is None else _settings_of_other("head", head),
        others=[
            _other_group(f"groups[{index}]", {"name": name, **each}) for index, each in enumerate(groups)
        ],
    )
    make: Callable[..., LowMemOptimizer] = owner
    return make(groups, lr=lr, **settings)


def _other_group(role: str, group: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Its patterns and its settings."""
    match = group.pop("match", None)
    patterns = [match] if isinstance(match, str) else match
    is_list = isinstance(patterns, (list, tuple)) and all(isinstance(each, str) and each for each in patterns)
    if not patterns or not is_list:
        raise ValueError(
            f"{role} needs match, parts of the names of its parameters, as in match=['v_proj']; found {match!r}"
        )
    return list(patterns), _settings_of_other(role, group)


def _settings_of_other(role: str, other: dict[str, Any]) -> dict[str, Any]:
    """A group's settings from what `fallback` or `head` says."""
    chosen = dict(other)
    if "name" not in chosen:
        raise ValueError(f"{role} needs a name, for example {{'name': 'adamw'}}")
    name = chosen.pop("name")
    known = settings_of(registry.optimizer_class(name))
    for key in chosen:
        if key not in known:
            raise ValueError(
                f"{role} {name} has no setting {key!r}{did_you_mean(key, known)} Settings: {', '.join(known)}"
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
