"""Configurations of LLaMA models by name, of which plans and pictures are made without their weights."""

from __future__ import annotations

from typing import Any


def llama(
    layers: int, width: int, mlp: int, heads: int, kv: int, vocabulary: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }  # fmt: skip


MODELS = {
    "Llama-3.2-1B": llama(16, 2048, 8192, 32, 8, 128256, tied=True),
    "Llama-3.2-3B": llama(28, 3072, 8192, 24, 8, 128256, tied=True),
    "LLaMA-2-7B": llama(32, 4096, 11008, 32, 32, 32000),
    "Llama-3.1-8B": llama(32, 4096, 14336, 32, 8, 128256),
    "LLaMA-2-13B": llama(40, 5120, 13824, 40, 40, 32000),
    "LLaMA-2-70B": llama(80, 8192, 28672, 64, 8, 32000),
}

PAPERS_LLAMA = {  # configs/llama_*.json of galore-torch, which papers on memory-efficient pre-training share
    "60M": llama(8, 512, 1376, 8, 8, 32000),
    "130M": llama(12, 768, 2048, 12, 12, 32000),
    "350M": llama(24, 1024, 2736, 16, 16, 32000),
    "1B": llama(24, 2048, 5461, 32, 32, 32000),
    "7B": MODELS["LLaMA-2-7B"],
}
