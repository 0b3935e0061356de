from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.example import IGNORED, Example
from lowmem.data.packing import packed

PAD = 9999


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_a_batch_gives_every_example_back(lengths, multiple):
    examples = [
        Example([10 * n + i for i in range(length)], [IGNORED if i % 2 else i for i in range(length)])
        for n, length in enumerate(lengths)
    ]
    data = TokenDataset(examples)
    batch = collate(PAD, multiple)([data[i] for i in range(len(data))])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    rows, columns = batch["input_ids"].shape
    assert rows == len(lengths)
    assert columns % multiple == 0
    assert max(lengths) <= columns < max(lengths) + multiple
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (columns - length)
        assert batch["input_ids"][row].tolist() == example.input_ids + [PAD] * (columns - length)
        assert batch["labels"][row].tolist() == example.labels + [IGNORED] * (columns - length)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_packed_batches_have_positions_and_no_attention_mask():
    documents = [Example(list(range(1, n + 1)), list(range(1, n + 1))) for n in (3, 5, 7, 2, 6)]
    sequences = packed(documents, 8, PAD, 0)
    loader = DataLoader(TokenDataset(sequences), batch_size=len(sequences), collate_fn=collate(PAD))
    (batch,) = list(loader)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    for name, tensor in batch.items():
        assert tensor.tolist() == [getattr(sequence, name) for sequence in sequences]
