"""Bytes of optimizer state for the LLaMA shapes that papers on memory-efficient training use."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from model_shapes import PAPERS_LLAMA
from torch import nn

from lowmem.optim.build import build_optimizer
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.fullest_turn import turning_groups
from lowmem.optim.optimizer_state import STEPS
from lowmem.optim.registry import optimizer_class
from lowmem.optim.settings import settings_of

SIZES = tuple(PAPERS_LLAMA)
INT8 = {"storage": {"moment": "int8", "variance": "int8"}}
SMALL_FALLBACK = {"fallback": {"name": "adafactor"}}

OTHERS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"momentum": 0.9}],
    "adafactor": [{"beta1": 0.9}],
    "sinkgd": [{"normalize": "row", "head": {"name": "sinkgd", "momentum": 0.9}, **SMALL_FALLBACK}],
    "apollo": [{"rank": 1, "scaling": "tensor", **SMALL_FALLBACK}],
    "frugal": [{"density": 0.0, **SMALL_FALLBACK}],
    "block_adam": [{"others": "frozen"}],
}
"""Settings that are a method of their own, or a choice with other bytes."""


@cache
def model(size: str) -> nn.Module:
    """A model in bfloat16 without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**PAPERS_LLAMA[size])).to(torch.bfloat16)


def state_bytes(size: str, name: str, settings: dict[str, Any]) -> int:
    """As the optimizer's `state_bytes()` counts them; where parameters take turns, in the fullest."""
    return _counted(size, name, json.dumps(settings))


@cache
def _counted(size: str, name: str, settings: str) -> int:
    optimizer = build_optimizer(model(size), name, lr=1e-4, **json.loads(settings))
    groups = turning_groups(optimizer)
    if not groups:
        return optimizer.state_bytes()
    blocks = optimizer_class(name).blocks(groups)[0][0][1]
    return max(_bytes_in_turn(optimizer, groups, turn) for turn in range(blocks))


def _bytes_in_turn(optimizer: LowMemOptimizer, groups: list[dict[str, Any]], turn: int) -> int:
    for group in groups:
        group[STEPS] = turn * group["refresh_every"]
    return optimizer.state_bytes()


def settings_shown(name: str) -> list[dict[str, Any]]:
    """The defaults, those with smaller state, and what else is worth a row; each with other bytes."""
    owner = optimizer_class(name)
    smaller = [SMALL_FALLBACK] if owner.treats_matrices else []
    if "storage" in settings_of(owner):
        smaller.append({**INT8, **(smaller[0] if smaller else {})})
    found: dict[int, dict[str, Any]] = {}
    for settings in [{}, *smaller, *OTHERS.get(name, [])]:
        found.setdefault(state_bytes("60M", name, settings), settings)
    return list(found.values())
