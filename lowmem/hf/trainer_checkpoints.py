"""transformers.Trainer whose checkpoints are complete or absent, and whose runs continue bit by bit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

from lowmem.errors import FaultError, RefusedError
from lowmem.hf.atomic_folder import (
    checkpoint_faults_explained,
    disk_faults_explained,
    worker_faults_explained,
)
from lowmem.hf.final_model import save_weights
from lowmem.hf.run_folder import STATE_FILE, RunFolder
from lowmem.hf.schedule import learning_rate_factor
from lowmem.recipe.schema import SchedulerRecipe
from lowmem.run.checkpoint import CHECKPOINT_PREFIX, has_optimizer_state, seal, step_of, verify
from lowmem.run.checkpoint_interval import Interval, read_interval, write_interval
from lowmem.run.checkpoint_probe import read_back, state_in_small


class CheckpointedTrainer(Trainer):
    """Saves into `run_folder` and keeps `keep` checkpoints. Who derives from it counts tokens and losses.

    Raises FaultError, naming the last complete checkpoint, when the disk or a process that prepares
    batches fails.
    """

    run_folder: RunFolder | None
    keep: int
    schedule: SchedulerRecipe
    optimizer_states: Literal["newest", "all"] = "newest"
    """Which of the kept checkpoints keep their optimizer state."""

    _interval_loss: Tensor  # the sum since the last row, over `_interval_steps` steps
    _interval_steps: int
    _cut_interval: tuple[Tensor, int] | None = None
    _saving_to: Path | None = None

    def _count_tokens_(self) -> int:
        """Bring the tokens seen, which a checkpoint keeps, up to date."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        newest = None if self.run_folder is None else self.run_folder.newest_checkpoint
        with worker_faults_explained(newest):
            return super().train(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Keep, for the checkpoint, the interval that a row of an interrupt cuts in two."""
        step = self.state.global_step
        is_regular = step % int(self.args.logging_steps) == 0 or step >= self.state.max_steps
        if self.control.should_log and not is_regular:
            self._cut_interval = (self._interval_loss.clone(), self._interval_steps)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._cut_interval = None

    def _interval_to_save(self) -> Interval:
        loss, steps = self._cut_interval or (self._interval_loss, self._interval_steps)
        return Interval(self.accelerator.gather(loss.reshape(1)).mean().item(), steps)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoint-N under a temporary folder and rename it when all of it is on the disk."""
        assert self.run_folder is not None, "checkpoints are switched on without a run folder"
        self._count_tokens_()
        interval = self._interval_to_save()
        name = f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        self._saving_to = self.run_folder.unfinished
        try:
            with disk_faults_explained(name, self.run_folder.newest_checkpoint):
                if self.args.should_save:
                    shutil.rmtree(self._saving_to, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_interval(self._saving_to / name, interval)
                    self.run_folder.publish_checkpoint_(
                        self._saving_to / name, keep=self.keep, optimizer_states=self.optimizer_states
                    )
                self.accelerator.wait_for_everyone()
        finally:
            if self.args.should_save:
                shutil.rmtree(self._saving_to, ignore_errors=True)  # what a full disk cut off takes room
            self._saving_to = None

    def try_to_save(self, total_steps: int, *, in_small: bool) -> float:
        """Write a checkpoint of the state before the first step and read it back; returns the seconds it took.

        The optimizer has no state yet, so every tensor it will have is stood in for by one value; with
        `in_small` every weight too. Raises FaultError for what cannot be written or read back.
        """
        assert self.run_folder is not None, "a trial without a run folder"
        begin = time.perf_counter()
        trial = self.run_folder.on_trial
        shutil.rmtree(trial, ignore_errors=True)
        try:
            with trial_explained(self.run_folder.newest_checkpoint):
                trial.mkdir(parents=True)
                save_weights(self.accelerator.unwrap_model(self.model), trial, in_small=in_small)
                torch.save(state_in_small(self.create_optimizer()), trial / "optimizer.pt")
                self._save_rng_state(str(trial))
                self.write_rest_of_trial(trial, total_steps)
                check_trial(trial)
        finally:
            shutil.rmtree(self.run_folder.unfinished, ignore_errors=True)
        return time.perf_counter() - begin

    def write_rest_of_trial(self, folder: Path, total_steps: int) -> None:
        """What is neither weights nor a process' own, on the main process."""
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        stand_in = torch.optim.SGD([torch.zeros(())])
        schedule = LambdaLR(stand_in, learning_rate_factor(self.schedule, total_steps))
        torch.save(schedule.state_dict(), folder / "scheduler.pt")
        write_interval(folder, Interval(0.0, 0))
        self.state.save_to_json(str(folder / STATE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoint_faults_explained(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        has_state = has_optimizer_state(Path(checkpoint))
        with checkpoint_faults_explained(Path(checkpoint)):
            if has_state:
                self._load_state(checkpoint)
            interval = read_interval(Path(checkpoint))
        if not has_state:
            self._advance_schedule_(step_of(Path(checkpoint)) or 0)
        self._interval_loss.fill_(interval.loss)
        self._interval_steps = interval.steps

    def _load_state(self, checkpoint: str) -> None:
        """Of the optimizer and the schedule."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _advance_schedule_(self, step: int) -> None:
        """Put the schedule where it was after `step`, without the files of an older checkpoint."""
        scheduler = self.lr_scheduler
        assert isinstance(scheduler, LambdaLR)
        position = {"last_epoch": step, "_step_count": step + 1}
        rates = [
            base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler.load_state_dict({**scheduler.state_dict(), **position, "_last_lr": rates})
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoint_faults_explained(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights as safetensors and the tokenizer; nothing pickled."""
        assert state_dict is None, "only sharded launches, which are refused, gather a state dict"
        if self.args.should_save:
            assert output_dir is not None
            assert self.processing_class is not None
            save_weights(self.accelerator.unwrap_model(self.model), output_dir)
            self.processing_class.save_pretrained(output_dir)


@contextmanager
def trial_explained(newest: Callable[[], Path | None]) -> Iterator[None]:
    """Turn whatever a writer raises for a value it cannot keep into a FaultError: that is what a trial is for."""
    try:
        with disk_faults_explained("The checkpoint on trial", newest):
            yield
    except (FaultError, RefusedError):
        raise
    except Exception as error:
        raise FaultError(
            f"What this run would save cannot be saved: {error or type(error).__name__} Nothing was trained yet. "
            "save.probe_at_start: false trains all the same, without checkpoints that can be relied on."
        ) from error


def check_trial(folder: Path) -> None:
    """Seal it, verify it, and read it back as who resumes does."""
    seal(folder, step=0)
    verify(folder)
    with safe_globals():  # numpy's types, for the file of the random generators
        read_back(folder)
