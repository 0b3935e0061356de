"""The micro-batches of the watched steps, so that the AdamW baseline measures exactly the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, Tensor]


class BatchRecorder:
    """Copies of the micro-batches of each step it is called with, on the CPU."""

    def __init__(self) -> None:
        self.steps: list[list[Batch]] = []

    def __call__(self, step: int, batches: list[Batch]) -> None:
        self.steps.append([{name: value.cpu().clone() for name, value in batch.items()} for batch in batches])

    def longest_sequence(self) -> int:
        """Tokens of the longest row, padding included; 0 when nothing was recorded."""
        return max((batch["input_ids"].shape[-1] for batches in self.steps for batch in batches), default=0)

    def save(self, path: Path) -> None:
        """Tensors named step.micro_batch.input."""
        tensors = {
            f"{step}.{micro}.{name}": value
            for step, batches in enumerate(self.steps)
            for micro, batch in enumerate(batches)
            for name, value in batch.items()
        }
        save_file(tensors, path)


class RecordedBatches(Dataset[Batch]):
    """The saved micro-batches in their order; use with batch size 1 and `only_item`."""

    def __init__(self, path: Path):
        grouped: dict[tuple[int, int], Batch] = {}
        for key, value in load_file(path).items():
            step, micro, name = key.split(".", 2)
            grouped.setdefault((int(step), int(micro)), {})[name] = value
        self.batches = [grouped[index] for index in sorted(grouped)]
        self.num_steps = len({step for step, _ in grouped})
        self.micro_batches = len(self.batches) // self.num_steps

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def only_item(batches: list[Batch]) -> Any:
    """A collate function for items that are batches already."""
    assert len(batches) == 1, "recorded batches are taken one at a time"
    return batches[0]
