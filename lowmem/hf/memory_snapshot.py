"""A snapshot of every block that CUDA's allocator holds, for PyTorch's viewer at pytorch.org/memory_viz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "memory_snapshot.pickle"
STEP = 3  # steps after the first: the optimizer's state is there, and the measured steps are left alone
HISTORY = 200_000  # allocations and frees; a step of a 7B model has some ten thousand


class SnapshotOfAStep(TrainerCallback):
    """Records one step with its stack traces and writes them to `path`; on a CPU it says that it cannot."""

    def __init__(self, path: Path, say: Callable[[str], Any]):
        self.path = path
        self.say = say
        self.step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type != "cuda":
            self.say(
                "report.memory_snapshot: only CUDA's allocator keeps a history; no snapshot on this device"
            )
            return
        self.step = min(state.global_step + STEP, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            torch.cuda.memory._dump_snapshot(str(self.path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"memory snapshot of step {self.step}: {self.path}; open it at pytorch.org/memory_viz")
