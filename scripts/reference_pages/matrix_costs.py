"""What a rule keeps for a matrix and needs of its gradient, read from what it declares."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from lowmem.optim.registry import optimizer_class
from lowmem.optim.rule import Rule, Turn

M, N = 4099, 11003
"""Primes, so that a dimension of the state tells where it comes from."""


def rule_and_settings(name: str) -> tuple[Rule, dict[str, Any]]:
    """The rule that the optimizer's defaults give a matrix (m, n), in its turn where there are turns."""
    matrix = torch.nn.Parameter(torch.empty(M, N, device="meta"))
    owner = optimizer_class(name)
    group = owner([matrix]).param_groups[0]  # type: ignore[call-arg]
    rule = owner.rule(group, (M, N))
    return (rule if owner.turn_length(group) is None else rule.in_turn(Turn(0, 0, 1, 0))), group


def state_values(name: str) -> str:
    """How many values of state a matrix (m, n) has with m < n: 2 m n. r is the rank and k the share `density` of n."""
    rule, group = rule_and_settings(name)
    letters = {1: "", M: "m", N: "n"}
    if group.get("rank") is not None:
        letters[group["rank"]] = "r"
    if group.get("density") is not None:
        letters[round(group["density"] * N)] = "k"
    terms: Counter[str] = Counter()
    for slot in rule.slots((M, N)).values():
        if all(side in letters for side in slot.shape):
            terms[" ".join(letters[side] for side in slot.shape if letters[side])] += 1
        elif math.prod(slot.shape) == math.ceil(M * N / 256):
            terms["m n / 256"] += 1
        else:
            terms[""] += math.prod(slot.shape)
    numbers = terms.pop("", 0)
    terms_shown = [f"{count} {term}" if count > 1 else term for term, count in terms.items()]
    return (
        " + ".join([*sorted(terms_shown, key=len, reverse=True), *([str(numbers)] if numbers else [])]) or "0"
    )


def gradient_needed(name: str) -> str:
    """How much of a matrix' gradient has to be there at one time."""
    rule, _ = rule_and_settings(name)
    if rule.is_projected:
        return "its projection"
    return "some rows" if rule.takes_rows else "the whole"
