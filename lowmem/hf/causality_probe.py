"""Is a model causal? Encoders such as BERT load as language models too, and would read the answer."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lowmem.hf.eval_mode import eval_mode


def attends_ahead(model: PreTrainedModel) -> bool:
    """Whether exchanging the last of six tokens changes the logits of the five before it."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size - 1, (1, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad(), eval_mode(model):
        one, two = (model(input_ids=row.to(model.device)).logits.float()[0, :-1] for row in (ids, other))
    # The same shapes run through the same kernels, so a causal model gives the same bits; an untrained encoder
    # moves by a thousandth of the spread.
    return not bool((one - two).abs().max() <= 1e-5 * one.std())
