"""A Trainer whose model Accelerate divides over processes: what it saves, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem.errors import RefusedError
from lowmem.hf.atomic_folder import checkpoint_faults_explained
from lowmem.hf.final_model import save_weights
from lowmem.hf.lora import restore_adapters_
from lowmem.hf.trainer_checkpoints import CheckpointedTrainer
from lowmem.hf.whole_weights import state_dict_in_small, whole_state_dict
from lowmem.optim.engine import LowMemOptimizer
from lowmem.run.checkpoint import WHOLE_STATE
from lowmem.run.checkpoint_probe import pieces_in_small
from lowmem.run.layouts.attach import StepsInPieces
from lowmem.run.layouts.load_whole_state import load_whole_state_
from lowmem.run.layouts.saved_pieces import file_name, load_pieces_, saved_pieces

WEIGHTS = "model*.safetensors"


class ShardedTrainer(CheckpointedTrainer):
    """Its checkpoints have the weights whole, as those of one process, and a file of optimizer state for each process.

    They are continued bit by bit by as many processes under the same strategy. Nothing that DeepSpeed pickles is
    written or read. Without sharding it is a CheckpointedTrainer.
    """

    steps_in_pieces: StepsInPieces | None
    once_divided: Callable[[], None] | None = None
    """Called by every process before its first step, where the model is divided."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Weights are loaded while the model is whole, and the state when it is in pieces."""
        if not self._is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_whole(Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if self.once_divided is not None:
            self.once_divided()
        return prepared

    def _load_whole(self, checkpoint: Path) -> None:
        with checkpoint_faults_explained(checkpoint):
            if isinstance(self.model, PeftModel):
                restore_adapters_(self.model, checkpoint)
            else:
                load_whole_weights_(self.model, checkpoint)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        weights = self.whole_weights()
        if self.args.should_save:
            assert self.processing_class is not None
            save_weights(self.accelerator.unwrap_model(self.model), output_dir, weights=weights)
            self.processing_class.save_pretrained(output_dir)

    def whole_weights(self) -> dict[str, Tensor]:
        """Those that checkpoints hold, of a LoRA model the adapters: on the main process, {} elsewhere.

        All must call it.
        """
        model = self.accelerator.unwrap_model(self.model)
        return whole_state_dict(model, keeps=self.args.should_save, only_trained=isinstance(model, PeftModel))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        assert self.steps_in_pieces is not None
        name = file_name(self.args.process_index, self.args.world_size)
        torch.save(saved_pieces(self.steps_in_pieces.pieces), folder / name)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def write_trial(self, folder: Path, total_steps: int) -> None:
        """This process' files of a checkpoint, every tensor cut down to one value; all must call it."""
        assert self.steps_in_pieces is not None
        folder.mkdir(parents=True, exist_ok=True)
        name = file_name(self.args.process_index, self.args.world_size)
        torch.save(pieces_in_small(self.steps_in_pieces.pieces), folder / name)
        self._save_rng_state(str(folder))
        model = self.accelerator.unwrap_model(self.model)
        weights = state_dict_in_small(model, only_trained=isinstance(model, PeftModel))
        if self.args.should_save:
            save_weights(model, folder, weights=weights)
            self.write_rest_of_trial(folder, total_steps)

    def _load_state(self, checkpoint: str) -> None:
        """Raises RefusedError for state that another launch has saved, which a Trainer would leave out silently."""
        whole = Path(checkpoint, WHOLE_STATE)
        if whole.is_file():
            self._load_whole_state(whole)
            return
        sharded = file_name(self.args.process_index, self.args.world_size)
        expected = sharded if self._is_sharded else "optimizer.pt"
        if not Path(checkpoint, expected).is_file():
            raise RefusedError(
                f"{checkpoint} has no {expected}: its optimizer state was saved by another number of processes or "
                "another strategy. Continue with the launch that saved it, or have the run written for any launch: "
                f"lowmem export --optimizer {Path(checkpoint).parent}"
            )
        if not self._is_sharded:
            super()._load_state(checkpoint)
            return
        assert self.steps_in_pieces is not None
        assert self.lr_scheduler is not None
        saved = torch.load(Path(checkpoint, expected), map_location="cpu", weights_only=True)
        load_pieces_(self.steps_in_pieces.pieces, saved)
        self._load_schedule(Path(checkpoint))

    def _load_whole_state(self, file: Path) -> None:
        """What `lowmem export --optimizer` has written, into whatever this launch has of each parameter."""
        whole = torch.load(file, map_location="cpu", weights_only=True)
        steps = self.steps_in_pieces
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer) if steps is None else steps.pieces
        assert isinstance(optimizer, LowMemOptimizer)
        load_whole_state_(optimizer, whole)
        self._load_schedule(file.parent)

    def _load_schedule(self, checkpoint: Path) -> None:
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
        # Elsewhere the rates come back with the optimizer's groups, which here are a library's.
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def load_whole_weights_(model: nn.Module | None, folder: Path) -> None:
    """From a checkpoint's safetensors, in one file or several; tied weights are there once.

    Raises RuntimeError where a weight is missing, unknown or of another shape.
    """
    assert model is not None
    missing, unexpected = set(model.state_dict()), set()
    for path in sorted(folder.glob(WEIGHTS)):
        weights = load_file(path)
        unexpected |= set(model.load_state_dict(weights, strict=False).unexpected_keys)
        missing -= weights.keys()
    missing -= set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or unexpected:
        raise RuntimeError(f"weights of another model: {', '.join(sorted(missing | unexpected)[:3])}")
