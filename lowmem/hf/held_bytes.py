"""What each process of a divided run holds: weights, optimizer state and, on CUDA, the peak of its allocator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.errors import LowMemError
from lowmem.hf.config_file import config_file
from lowmem.hf.metering import steps_to_watch
from lowmem.hf.peak import PeakSoFar
from lowmem.hf.sharded_trainer import ShardedTrainer
from lowmem.memory.architecture import Architecture
from lowmem.memory.divided_estimate import divided_estimate
from lowmem.memory.divided_pieces import Strategy
from lowmem.memory.ledger import rounded
from lowmem.memory.owners import storages_of
from lowmem.memory.processes import HeldByProcesses
from lowmem.recipe.schema import Recipe
from lowmem.run.layouts.piece_optimizer import PieceOptimizer


class HeldBytes(TrainerCallback):
    """Counts after a few steps and the last, and keeps the fullest; the peak is looked at after every step."""

    def __init__(self, trainer: ShardedTrainer, peak: PeakSoFar):
        self.trainer, self.peak = trainer, peak
        self.steps: set[int] = set()
        self.counted = 0
        """After how many steps."""
        self.weights = self.optimizer_state = 0
        self.peak_bytes: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps = steps_to_watch(state.global_step + 1, state.max_steps) | {state.max_steps}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            self.peak_bytes = self.peak()
        if state.global_step in self.steps:
            steps = self.trainer.steps_in_pieces
            assert steps is not None
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.weights = max(self.weights, storage_bytes(weights_of(model, steps.pieces)))
            self.optimizer_state = max(self.optimizer_state, storage_bytes(state_of(steps.pieces)))
            self.counted += 1

    def of_all(self) -> HeldByProcesses | None:
        """To be called by all processes; None where no step was made."""
        if not self.counted:
            return None
        device = self.trainer.args.device
        own = torch.tensor([[self.weights, self.optimizer_state, self.peak_bytes or 0]], device=device)
        weights, state, peaks = self.trainer.accelerator.gather(own).T.tolist()
        return HeldByProcesses(weights, state, peaks if device.type == "cuda" else None)


def weights_of(model: nn.Module, pieces: PieceOptimizer) -> Iterator[Tensor]:
    """What this process has of the parameters and buffers, and weights that are finer than the model's.

    ZeRO-3 keeps a process' part of a parameter beside it.
    """
    for param in model.parameters():
        yield param.to_local() if isinstance(param, DTensor) else param.detach()
        part = getattr(param, "ds_tensor", None)
        if isinstance(part, Tensor):
            yield part
    yield from model.buffers()
    yield from (piece.weight() for piece in pieces.all_pieces())


def state_of(pieces: PieceOptimizer) -> Iterator[Tensor]:
    yield from (tensor for state in pieces.state.values() for tensor in state.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once and rounded as an allocator does."""
    storages = {storage._cdata: storage for tensor in tensors for storage in storages_of(tensor)}
    return sum(rounded(storage.nbytes()) for storage in storages.values())


def planned_processes(
    recipe: Recipe, strategy: Strategy, world: int, *, on_cuda: bool
) -> HeldByProcesses | str:
    """What `lowmem plan --world` says of weights and state, or in words why it says nothing.

    A failure here is told and does not undo a run that is done.
    """
    try:
        architecture = Architecture.from_config(config_file(recipe.model))
        found = divided_estimate(recipe, architecture, strategy, world, on_cuda=on_cuda)
    except LowMemError as error:
        return str(error).rstrip(".")
    except Exception as error:  # the run's own result stands
        return f"the formulas failed: {type(error).__name__}: {error}"
    # Every strategy that divides gives each process as much of the weights.
    return HeldByProcesses([found.fullest.parts["weights"]] * world, found.state, None)
