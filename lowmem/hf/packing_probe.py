"""Does a packed sequence train the same as its documents one by one? Ask the model before a run relies on it.

Packed rows carry position ids that restart at each document, no attention mask, and no cache; transformers
builds the block-diagonal mask from that. Not every model and attention implementation does: recurrent layers
carry their state across, and flash attention looks at position ids only in batches of one row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowmem.errors import RefusedError
from lowmem.hf.eval_mode import eval_mode

# Rows of documents, by length. A document of one token has no second position to be recognised by.
DOCUMENTS = ((11, 1, 6), (5, 13))

# Largest difference that is rounding, in standard deviations of the logits. Alone and packed, a document runs
# through other kernels; behind two different neighbours it runs through the same ones and hardly differs.
ROUNDING_TO_ALONE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
ROUNDING_TO_OTHER_NEIGHBOUR = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


class Leak(NamedTuple):
    """Root mean square differences of the worst token's logits, in standard deviations of all logits."""

    from_alone: float  # packed against each document in a row of its own
    from_other_neighbour: float  # packed, against packed behind another first document


def packing_leak(model: PreTrainedModel, vocab_size: int | None = None, *, rows: int = 2) -> float:
    """How far logits of packed documents are from those of the same documents alone.

    The largest root mean square difference of one token's logits, in standard deviations of the logits: about
    1e-6 in float32 and 0.02 in bfloat16 where nothing leaks, of the order of 1 where documents see each other.
    vocab_size: random ids are drawn below it; None takes that of its configuration. rows: 1 or 2, packed rows in
    one batch. The model's training flags and all random states stay as they were.
    """
    return _measure(model, vocab_size, rows).from_alone


def refuse_leaking_model(model: PreTrainedModel, *, rows: int = 2) -> None:
    """Raise RefusedError when documents in a packed row influence each other in this model.

    rows: sequences per batch that the run will use; more than 2 are probed as 2.
    """
    rows = min(rows, 2)
    name = f"{type(model).__name__} with model.attn: {model.config._attn_implementation}"
    try:
        reason = _reason(model, rows)
        works_alone = reason is not None and rows > 1 and _reason(model, 1) is None
    except TypeError as error:
        raise RefusedError(
            f"data.packing: true does not work with {name}: it cannot be called with packed rows ({error}). "
            "Use data.packing: false."
        ) from error
    if reason is None:
        return
    nearest = "Use data.packing: false."
    if works_alone:
        nearest = "It is right with one row: use train.per_device_batch_size: 1, or model.attn: sdpa."
    raise RefusedError(f"data.packing: true would train wrongly with {name}: {reason}. {nearest}")


def _reason(model: PreTrainedModel, rows: int) -> str | None:
    leak = _measure(model, None, rows)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    # Written so that NaN is refused as well.
    if not leak.from_other_neighbour <= ROUNDING_TO_OTHER_NEIGHBOUR[dtype]:
        return (
            "documents in one row influence each other; when the first is exchanged, the logits of the next move "
            f"by {leak.from_other_neighbour:.2g} standard deviations"
        )
    if not leak.from_alone <= ROUNDING_TO_ALONE[dtype]:
        return (
            "documents in one row do not get the logits that they get in a row of their own; they are "
            f"{leak.from_alone:.2g} standard deviations apart"
        )
    return None


def _measure(model: PreTrainedModel, vocab_size: int | None, rows: int) -> Leak:
    highest = vocab_size or model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    packed_rows = [
        [torch.randint(highest, (length,), generator=generator) for length in lengths]
        for lengths in DOCUMENTS[:rows]
    ]
    other_rows = [
        [torch.randint(highest, (len(row[0]),), generator=generator), *row[1:]] for row in packed_rows
    ]
    with torch.no_grad(), eval_mode(model):
        alone = [_logits(model, [[document]]) for row in packed_rows for document in row]
        packed = _documents(_logits(model, packed_rows), packed_rows)
        behind_other = _documents(_logits(model, other_rows), packed_rows)
    scale = torch.cat([logits[0] for logits in alone]).std().item()

    def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return max((one - other).square().mean(-1).sqrt().max().item() for one, other in pairs) / scale

    is_first = [index == 0 for row in packed_rows for index in range(len(row))]
    later = [
        pair
        for pair, first in zip(zip(packed, behind_other, strict=True), is_first, strict=True)
        if not first
    ]
    return Leak(
        from_alone=worst([(one, other[0]) for one, other in zip(packed, alone, strict=True)]),
        from_other_neighbour=worst(later),
    )


def _logits(model: PreTrainedModel, rows: list[list[Tensor]]) -> Tensor:
    """Logits (rows, tokens, vocabulary), float32, of rows that each hold some documents one after the other."""
    input_ids = torch.stack([torch.cat(row) for row in rows]).to(model.device)
    positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
    position_ids = torch.stack(positions).to(model.device)
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float().cpu()


def _documents(logits: Tensor, rows: list[list[Tensor]]) -> list[Tensor]:
    lengths = [[len(document) for document in row] for row in rows]
    return [part for row, sizes in zip(logits, lengths, strict=True) for part in row.split(sizes)]
