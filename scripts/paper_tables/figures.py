"""What a table of published figures is made of: model shapes, figures of ours, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from lowmem.optim.build import build_optimizer

UNITS = {"GB": 10**9, "GiB": 2**30}
BF16, FP32 = torch.bfloat16, torch.float32


def llama(hidden: int, intermediate: int, heads: int, layers: int, **other: Any) -> PreTrainedConfig:
    shape = dict(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads)
    return LlamaConfig(**{"vocab_size": 32000, **shape, "num_hidden_layers": layers, **other})


SHAPES: dict[str, PreTrainedConfig] = {  # 60M to 7B: configs/llama_*.json of jiaweizzhao/GaLore
    "60M": llama(512, 1376, 8, 8),
    "130M": llama(768, 2048, 12, 12),
    "350M": llama(1024, 2736, 16, 24),
    "1B": llama(2048, 5461, 32, 24),
    "7B": llama(4096, 11008, 32, 32),
    "3B": llama(
        *(3072, 8192, 24, 28),
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "GPT-2 XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
PRETRAINED = ("60M", "130M", "350M", "1B")


@dataclass(frozen=True)
class Ours:
    """A figure of ours in bytes, computed when asked for."""

    count: Callable[[], int]
    simulated: bool = False

    def __add__(self, other: Ours) -> Ours:
        return Ours(lambda: self.count() + other.count())

    def __sub__(self, other: Ours) -> Ours:
        return Ours(lambda: self.count() - other.count())


@cache
def model(shape: str, dtype: torch.dtype = BF16) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)


def weights(shape: str, dtype: torch.dtype = BF16) -> Ours:
    return Ours(lambda: sum(param.nbytes for param in model(shape, dtype).parameters()))


def state(shape: str, name: str, dtype: torch.dtype = BF16, **settings: Any) -> Ours:
    return Ours(lambda: build_optimizer(model(shape, dtype), name, lr=1e-3, **settings).state_bytes())


@dataclass(frozen=True)
class Row:
    """A published figure (all its digits) and ours. `why` explains the difference where the digits differ."""

    what: str
    where: str  # in the table's source
    published: str
    ours: Ours
    why: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    source: str  # arXiv id or address
    unit: str  # as published: G, GB or GiB
    reads_as: str  # GB or GiB, which the source's exact figures fit; "nearer" where it mixes them
    conditions: str
    rows: list[Row]


def by_size(
    what: str, where: str, figures: str, ours: Callable[[str], Ours], why: str = "", **whys: str
) -> list[Row]:
    """The four published sizes in order; `_350M="..."` explains one of them."""
    return [
        Row(f"{what}, {size}", where, published, ours(size), whys.get(f"_{size}", why))
        for size, published in zip(PRETRAINED, figures.split(), strict=True)
    ]


def nominal(count: str, times: str, shape: str) -> str:
    return f"{count} nominal parameters x {times}; the shape has {weights(shape).count() / 2e9:.3f} billion."
