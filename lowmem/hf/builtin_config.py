"""The shape of `builtin:tiny-llama`, as a config.json would hold it. Imports nothing."""

from __future__ import annotations

from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3
CHARACTERS = ("\t", "\n", "\r", *(chr(code) for code in range(ord(" "), ord("~") + 1)))
LONGEST_SEQUENCE = 1024  # tokens, hence characters

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(SPECIAL_TOKENS) + len(CHARACTERS),
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST_SEQUENCE,
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
}
"""A LLaMA of 0.83 million parameters, 95 % of them in the matrices of attention and MLP.

Two layers 192 wide, six heads that share two keys and values, a vocabulary of 102 characters. The first
weights are drawn with a deviation of 0.04 instead of LLaMA's 0.02, which is meant for wider models; at
this width the larger one learns the same in fewer steps.
"""
