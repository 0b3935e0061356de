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


class StepBatches(Dataset[Batch]):
    """The micro-batches of some steps in their order; use with batch size 1 and `only_item`."""

    def __init__(self, steps: list[list[Batch]]):
        self.batches = [batch for step in steps for batch in step]
        self.num_steps = len(steps)
        self.micro_batches = len(self.batches) // self.num_steps

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class RecordedBatches(StepBatches):
    """Those that `BatchRecorder.save` has written."""

    def __init__(self, path: Path):
        steps: dict[int, dict[int, Batch]] = {}
        for key, value in load_file(path).items():
            step, micro, name = key.split(".", 2)
            steps.setdefault(int(step), {}).setdefault(int(micro), {})[name] = value
        super().__init__([[steps[step][micro] for micro in sorted(steps[step])] for step in sorted(steps)])


def only_item(batches: list[Batch]) -> Any:
    """A collate function for items that are batches already."""
    assert len(batches) == 1, "recorded batches are taken one at a time"
    return batches[0]
