"""Recipes that train in a second: a LLaMA of a few thousand weights on generated sums."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

gc.freeze()  # every run collects garbage a few times, and would walk over all imported modules each time

CHARACTERS = ["<pad>", "</s>", "<unk>", "\n", *map(chr, range(32, 127)), "\u00e4", "\u2192"]

RECIPE = """
model: {{name_or_path: {model}, dtype: float32}}
data:
  train: {{path: {data}/train.jsonl, format: prompt_response}}
  eval: {{path: {data}/held_out.jsonl, format: prompt_response}}
  max_length: 64
optimizer: {{name: galore, lr: 3.0e-3, rank: 4, refresh_every: 3}}
train: {{max_steps: 6, per_device_batch_size: 4, lr_scheduler: {{name: cosine}}}}
save: {{dir: {run}}}
report: {{baseline: none, plan: false, log_every: 2}}
"""


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; id 0 pads, id 1 ends a text."""
    vocabulary = {character: number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_config(**settings: object) -> LlamaConfig:
    sizes = {
        "vocab_size": len(CHARACTERS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**{**sizes, **settings})


def write_model(folder: Path) -> Path:
    """A model folder such as one downloads."""
    set_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_rows(folder: Path, name: str, count: int, seed: int) -> Path:
    """Sums of uneven length."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        terms = [draw.randrange(10 ** draw.randint(1, 3)) for _ in range(draw.randint(2, 4))]
        rows.append({"prompt": "+".join(map(str, terms)) + "=", "response": str(sum(terms))})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path) -> Path:
    """sums.yaml with its data in `folder`; its run goes to `folder`/run."""
    write_rows(folder, "train", 40, seed=1)
    write_rows(folder, "held_out", 9, seed=2)
    path = folder / "sums.yaml"
    path.write_text(RECIPE.format(model=model, data=folder, run=folder / "run"), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, model: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder, model), overrides)
