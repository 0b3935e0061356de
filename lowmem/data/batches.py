"""Examples as tensors. The only file of this folder that imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowmem.data.example import IGNORED, Example


class TokenDataset(Dataset[dict[str, list[int]]]):
    """Examples by number, as dicts of lists: input_ids, labels and, when packed, position_ids."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        lists = {"input_ids": example.input_ids, "labels": example.labels}
        if example.position_ids is not None:
            lists["position_ids"] = example.position_ids
        return lists


def collate(
    pad_token_id: int, pad_to_multiple_of: int = 8
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A function that makes int64 tensors (batch, tokens) of a list of `TokenDataset` items.

    Unpacked: input_ids, attention_mask and labels, padded on the right to the longest and to a multiple
    of `pad_to_multiple_of`. Packed: input_ids, position_ids and labels, and no attention_mask, so that
    attention is cut where the positions restart; packed sequences are equally long and need no padding.
    Labels stand at their own token; the model shifts them.
    """

    def batch(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "position_ids" in items[0]:
            return {name: torch.tensor([item[name] for item in items]) for name in items[0]}
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

        def padded(name: str, filler: int) -> Tensor:
            return torch.tensor([item[name] + [filler] * (length - len(item[name])) for item in items])

        mask = [[int(i < len(item["input_ids"])) for i in range(length)] for item in items]
        return {
            "input_ids": padded("input_ids", pad_token_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED),
        }

    return batch
