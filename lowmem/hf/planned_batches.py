"""The batches that a plan assumes, since it reads no data: as long as the recipe allows, every token trained."""

from __future__ import annotations

import torch

from lowmem.data.example import IGNORED
from lowmem.hf.recorded_batches import Batch
from lowmem.recipe.schema import Recipe

PAD_TO = 8
"""What a batch of rows is padded to a multiple of."""


def planned_batch(
    recipe: Recipe, *, rows: int | None = None, length: int | None = None, full_rows: bool = False
) -> Batch:
    """A micro-batch of `rows` sequences of `length` tokens; by default those of the recipe.

    Unpacked, one token of each row is padding, as in nearly every batch of real rows, so that attention needs
    a mask; packed, each row holds two documents. `full_rows`: neither, and attention needs none.
    """
    rows = rows or recipe.train.per_device_batch_size
    length = length or recipe.data.max_length
    if recipe.data.packing:
        length = length if full_rows else max(length, 2)
        documents = [length] if full_rows else [length - length // 2, length // 2]
        positions = torch.cat([torch.arange(document) for document in documents])
        labels = torch.where(positions == 0, IGNORED, 0)
        one = {
            "input_ids": torch.zeros(length, dtype=torch.int64),
            "position_ids": positions,
            "labels": labels,
        }
    else:
        length = -(-length // PAD_TO) * PAD_TO
        mask = torch.ones(length, dtype=torch.int64)
        if not full_rows:
            mask[-1] = 0
        one = {
            "input_ids": torch.zeros(length, dtype=torch.int64),
            "attention_mask": mask,
            "labels": torch.where(mask == 1, 0, IGNORED),
        }
    return {name: value.expand(rows, -1).contiguous() for name, value in one.items()}
