"""Causal language models of a few thousand weights, one for each thing that heads and losses do."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    # The default has no float64 kernel.
    "experts_implementation": "eager",
}
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}

# name -> (configuration class, settings that differ from SIZES)
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2_softcap": ("Gemma2Config", {"final_logit_softcapping": 3.0}),
    "cohere_logit_scale": ("CohereConfig", {"logit_scale": 0.25}),
    "granite_logits_scaling": ("GraniteConfig", {"logits_scaling": 4.0}),
    "mixtral_router_loss": ("MixtralConfig", MOE),
    "qwen2": ("Qwen2Config", {}),
    "phi_head_bias": ("PhiConfig", {}),
    "gpt2": ("GPT2Config", GPT2),
    "mamba": ("MambaConfig", {"state_size": 4}),
}


def tiny_model(
    kind: str = "llama", *, vocab_size: int = 199, dtype: torch.dtype = torch.float32, **settings: object
) -> PreTrainedModel:
    """A randomly initialised model of that kind in training mode, the same at every call. Its weights are
    larger than usual, so that logits differ enough for mistakes to show."""
    class_name, own = KINDS[kind]
    config = getattr(transformers, class_name)(**{**SIZES, "vocab_size": vocab_size, **own, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def tiny_batch(vocab_size: int = 199, rows: int = 2, tokens: int = 21) -> dict[str, torch.Tensor]:
    """input_ids and labels (rows, tokens); a third of the labels is ignored, and different ones in each row."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, vocab_size, (rows, tokens), generator=generator)
    labels = input_ids.masked_fill(torch.rand(input_ids.shape, generator=generator) < 0.33, -100)
    return {"input_ids": input_ids, "labels": labels}


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Turn activation checkpointing on, under whichever name this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
