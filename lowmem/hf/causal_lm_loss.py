"""The loss function that a patched causal language model calls in place of transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.hf.tiled_cross_entropy import tiled_cross_entropy


def chunked_causal_lm_loss(
    logits: DeferredLogits | Tensor,  # (B, S, V)
    labels: Tensor,  # (B, S)
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss computes, from logits that need not exist; nats per trained token.

    Differs from it in one thing: deferred logits without any trained token give a loss of 0 with zero
    gradients, not 0/0. `kwargs` are those that models hand to every loss function; none concerns this one.
    """
    if isinstance(logits, DeferredLogits) and (not logits.is_deferred or logits.shape[-1] != vocab_size):
        logits = logits.tensor(f"a loss over {vocab_size} of {logits.shape[-1]} logits")
    if not isinstance(logits, DeferredLogits):
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )

    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    trained = (targets != ignore_index).nonzero().squeeze(1)
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    assert len(targets) == len(hidden), "labels and hidden states count different tokens"
    total = tiled_cross_entropy(
        hidden.index_select(0, trained),
        logits.head.weight,
        logits.head.bias,
        targets[trained],
        functions=logits.functions,
        tile_bytes=logits.head.tile_bytes,
    )
    if num_items_in_batch is None:
        return total / max(len(trained), 1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
