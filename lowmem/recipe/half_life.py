"""The decay of a second moment, given in tokens instead of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import OptimizerRecipe

GIVES_BETA2 = ("betas", "beta2")
"""Settings that hold a beta2."""

WITHOUT_SECOND_MOMENT = ("lion8bit",)
"""Optimizers with a setting of such a name that is the decay of another mean."""


def beta2_of(half_life_tokens: float, tokens_per_step: float) -> float:
    """beta2 with which a squared gradient counts half after `half_life_tokens` more tokens.

        beta2^(half_life / tokens of a step) = 1/2

    Source: Marek et al., "Small Batch Size Training for Language Models", arXiv:2507.07101: with the half-life kept,
    and not beta2, small batches train as stably as large ones.
    """
    return float(0.5 ** (tokens_per_step / half_life_tokens))


def with_beta2(chosen: OptimizerRecipe, tokens_per_step: float, *, rest: str | None) -> OptimizerRecipe:
    """`chosen` with the beta2 that its half-life means, for its own rule and for that of the other parameters.

    rest: the optimizer that these take where the recipe names no fallback, None where there are none. A fallback
    with a beta2 of its own keeps it, and one without a second moment has none.
    """
    if chosen.beta2_half_life_tokens is None:
        return chosen
    beta2 = beta2_of(chosen.beta2_half_life_tokens, tokens_per_step)
    fallback = chosen.fallback or (None if rest is None else {"name": rest})
    fallback = _other_with(fallback, beta2)
    settings = _with(chosen.name, chosen.settings, beta2)
    groups = [_group_with(each, chosen.name, beta2) for each in chosen.groups]
    head = _other_with(chosen.head, beta2)
    return replace(chosen, settings=settings, fallback=fallback, head=head, groups=groups)


def with_second_moment() -> list[str]:
    """The optimizers with a beta2 that a half-life can give."""
    return [name for name in optimizer_table() if _gives_beta2(name)]


def _gives_beta2(name: str) -> bool:
    known = optimizer_table()[name]["settings"]
    return name not in WITHOUT_SECOND_MOMENT and any(setting in known for setting in GIVES_BETA2)


def _other_with(other: Mapping[str, Any] | None, beta2: float) -> dict[str, Any] | None:
    if other is None:
        return None
    own = {key: value for key, value in other.items() if key != "name"}
    return {"name": other["name"], **_with(other["name"], own, beta2)}


def _group_with(group: Mapping[str, Any], main: str, beta2: float) -> dict[str, Any]:
    own = {key: value for key, value in group.items() if key not in ("match", "name")}
    kept = {key: group[key] for key in ("match", "name") if key in group}
    return {**kept, **_with(group["name"], own, beta2)} if group.get("name", main) != main else dict(group)


def _with(name: str, settings: Mapping[str, Any], beta2: float) -> dict[str, Any]:
    known = optimizer_table()[name]["settings"]
    if not _gives_beta2(name) or any(settings.get(key) is not None for key in GIVES_BETA2):
        return dict(settings)
    if "betas" in known:
        return {**settings, "betas": [known["betas"]["default"][0], beta2]}
    return {**settings, "beta2": beta2}
