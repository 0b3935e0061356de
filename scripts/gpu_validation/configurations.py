"""The training runs whose plan is held against a GPU: one line each, the most valuable first."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

SMALL = 32
"""A rehearsal's vocabulary, MLP, rank and length are this many times smaller."""

SMALL_LAYERS = 2
SMALL_HEADS = 12  # as often shared as those of every model here
SMALL_WIDTH = 96

MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "LLaMA-3.2-3B": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "LLaMA-2-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}

RECIPE = """
model: {name_or_path: random, dtype: bfloat16}
data: {train: {builtin: arithmetic}}
optimizer: {name: adamw, lr: 1.0e-5}
save: {model: false}
report: {baseline: none}
"""


@dataclass(frozen=True)
class Configuration:
    """One run. `optimizer` is what stands under `optimizer:` in a recipe, without lr and rank.

    `rows`: padded (one token of each row is padding, so attention has a mask), packed (two documents a row) or
    full (no mask). `torch_adamw` puts one of torch's AdamW (lowmem/hf/adamw_variants.py) in the optimizer's
    place. `layers` keeps the first ones only. `card_gib`: the allocator gets what a card of this size
    leaves it. `also` are more overrides of the recipe, `key=value`.
    """

    name: str
    model: str
    optimizer: str = "name: adamw"
    rank: int | None = None
    tokens: int = 1024
    batch: int = 1
    accumulate: int = 1
    rows: Literal["padded", "packed", "full"] = "padded"
    checkpointing: bool = True
    loss: Literal["chunked", "plain"] = "chunked"
    torch_adamw: str | None = None
    layers: int | None = None
    card_gib: int | None = None
    also: tuple[str, ...] = ()

    def recipe(self, *, small: bool) -> Recipe:
        """Raises RecipeError for a line of CONFIGURATIONS that is no valid recipe."""
        divisor = SMALL if small else 1
        rank = "" if self.rank is None else f", rank: {self.rank // divisor}"
        overrides = [
            f"optimizer={{lr: 1.0e-5, {self.optimizer}{rank}}}",
            f"data.max_length={self.tokens // divisor}",
            f"data.packing={str(self.rows == 'packed').lower()}",
            f"train.per_device_batch_size={self.batch}",
            f"train.gradient_accumulation_steps={self.accumulate}",
            f"train.activation_checkpointing={str(self.checkpointing).lower()}",
            f"train.loss={self.loss}",
            *self.also,
        ]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "configuration.yaml")
            file.write_text(RECIPE, encoding="utf-8")
            return load_recipe(file, overrides, files_must_exist=False)

    def shape(self, *, small: bool) -> dict[str, Any]:
        """Settings of transformers' LlamaConfig."""
        shape = dict(MODELS[self.model])
        if self.layers is not None:
            shape["num_hidden_layers"] = self.layers
        if small:
            shape["num_hidden_layers"] = min(shape["num_hidden_layers"], SMALL_LAYERS)
            shape["vocab_size"] //= SMALL
            shape["intermediate_size"] //= SMALL
            shared_by = shape["num_attention_heads"] // shape["num_key_value_heads"]
            shape["num_attention_heads"], shape["num_key_value_heads"] = SMALL_HEADS, SMALL_HEADS // shared_by
            shape["hidden_size"], shape["head_dim"] = SMALL_WIDTH, SMALL_WIDTH // SMALL_HEADS
        return shape


OFFLOAD = "train.activation_offload=true"
INT8 = "model.weights=int8"
ALL_INT8 = (INT8, "model.int8={embeddings: true}")
FUSED = "train.max_grad_norm=null"
"""Without a norm to clip by, `auto` uses each gradient inside backward."""
FACTORED = "fallback: {name: adafactor}"
Q_GALORE = f"name: q_galore, {FACTORED}"
SINKGD = f"name: sinkgd, {FACTORED}"

# fmt: off
CONFIGURATIONS = (
    Configuration("1b-galore", "LLaMA-3.2-1B", "name: galore", rank=256),
    Configuration("1b-adamw-fused", "LLaMA-3.2-1B", torch_adamw="adamw_fused", rows="full"),
    Configuration("7b-galore", "LLaMA-2-7B", "name: galore", rank=1024, rows="full"),
    Configuration("7b-int8-8gb", "LLaMA-2-7B", SINKGD, tokens=512, card_gib=8, also=(*ALL_INT8, FUSED)),
    Configuration("7b-int8-10gb", "LLaMA-2-7B", SINKGD, tokens=512, card_gib=10, also=(INT8, FUSED)),
    Configuration("7b-int8-12gb", "LLaMA-2-7B", Q_GALORE, rank=256, card_gib=12, also=(INT8, FUSED)),
    Configuration("7b-galore-r256", "LLaMA-2-7B", "name: galore", rank=256, also=(FUSED,)),
    Configuration("1b-galore-plain-loss", "LLaMA-3.2-1B", "name: galore", rank=128, tokens=512, batch=4, loss="plain"),
    Configuration("1b-adamw-in-backward", "LLaMA-3.2-1B", torch_adamw="adamw_fused_backward", tokens=2048),
    Configuration("1b-sgd-long-rows", "LLaMA-3.2-1B", "name: sgd", tokens=4096, rows="packed"),
    Configuration("7b-sgd-sai", "LLaMA-2-7B", "name: sgd_sai", tokens=512, batch=4),
    Configuration("7b-offload", "LLaMA-2-7B", "name: sgd", tokens=512, batch=8, also=(OFFLOAD,)),
    Configuration("3b-galore-accumulate", "LLaMA-3.2-3B", "name: galore", rank=512, tokens=2048, accumulate=2),
    Configuration("1b-activations", "LLaMA-3.2-1B", "name: sgd", tokens=2048, rows="full", checkpointing=False),
    Configuration("1b-activations-mask", "LLaMA-3.2-1B", "name: sgd", tokens=2048, rows="packed", checkpointing=False),
    Configuration("1b-lora", "LLaMA-3.2-1B", tokens=2048, rows="packed", also=("lora={r: 16}",)),
    Configuration("1b-adamw-foreach", "LLaMA-3.2-1B", torch_adamw="adamw_foreach", tokens=512, accumulate=2),
    Configuration("7b-adamw", "LLaMA-2-7B", tokens=2048, rows="full"),
    Configuration("3b-adamw-fused", "LLaMA-3.2-3B", torch_adamw="adamw_fused", tokens=4096, rows="full"),
    Configuration("1b-galore-refresh", "LLaMA-3.2-1B", "name: galore, refresh_every: 2", rank=512, tokens=512),
    Configuration("1b-float32", "LLaMA-3.2-1B", "name: galore", rank=128, tokens=512, also=("model.dtype=float32",)),
    Configuration("7b-adamw-in-backward", "LLaMA-2-7B", torch_adamw="adamw_fused_backward", tokens=4096, rows="full"),
    Configuration("1b-galore-svd", "LLaMA-3.2-1B", "name: galore, projection: svd", rank=128, tokens=512, layers=2),
)
# fmt: on


def configuration(name: str) -> Configuration:
    return next(each for each in CONFIGURATIONS if each.name == name)
