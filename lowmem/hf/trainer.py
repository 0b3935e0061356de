"""transformers.Trainer with lowmem's optimizer, schedule, evaluation, memory meter and safe checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import safe_globals

from lowmem.errors import FaultError, RefusedError
from lowmem.hf.atomic_folder import (
    checkpoint_faults_explained,
    disk_faults_explained,
    worker_faults_explained,
)
from lowmem.hf.final_model import save_weights
from lowmem.hf.metering import StepWatch
from lowmem.hf.run_folder import STATE_FILE, RunFolder
from lowmem.hf.schedule import learning_rate_factor
from lowmem.hf.trainer_mixin import LowMemTrainerMixin
from lowmem.recipe.schema import SchedulerRecipe
from lowmem.run.checkpoint import CHECKPOINT_PREFIX, has_optimizer_state, seal, step_of, verify
from lowmem.run.checkpoint_interval import Interval, read_interval, write_interval
from lowmem.run.checkpoint_probe import read_back, state_in_small
from lowmem.run.choose import Requested
from lowmem.run.execution import Clip, RefreshFrom

Batch = dict[str, Tensor]
Evaluator = Callable[[nn.Module], dict[str, float | None] | None]


class LowMemTrainer(LowMemTrainerMixin, Trainer):
    """One run. Adds to the Trainer's loop:

    - the loss of a step is the mean over all its trained tokens, and 0 when it has none;
    - `log` gets the loss of every step since the last line, NaN included, and the tokens seen;
    - `watch` sees where forward, backward and the optimizer begin and end;
    - a checkpoint is complete or absent, and `keep` of them stay.

    `evaluator` maps the model to metrics, or None when it was interrupted. `on_batches(step, batches)` is
    called with the micro-batches of every watched step, before the watching begins.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
        schedule: SchedulerRecipe,
        train_dataset: Dataset[Any],
        collate: Callable[[list[Any]], Batch],
        watch: StepWatch,
        tokenizer: PreTrainedTokenizerBase | None = None,
        evaluator: Evaluator | None = None,
        on_batches: Callable[[int, list[Batch]], None] | None = None,
        run_folder: RunFolder | None = None,
        keep: int = 1,
        callbacks: list[TrainerCallback] | None = None,
        execution: Requested = "auto",
        clip: Clip = "applied",
        refresh_from: RefreshFrom = "boundary",
    ):
        super().__init__(
            execution=execution,
            clip=clip,
            refresh_from=refresh_from,
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.optimizer_of = optimizer_of
        self.schedule = schedule
        self.watch = watch
        self.evaluator = evaluator
        self.on_batches = on_batches
        self.run_folder = run_folder
        self.keep = keep
        self.evaluations: dict[int, dict[str, float | None]] = {}
        self._saving_to: Path | None = None
        self._interval_loss = torch.zeros((), device=args.device)
        self._interval_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self._interval_steps = 0
        if args.gradient_accumulation_steps > 1 and not self.model_accepts_loss_kwargs:
            raise RefusedError(
                f"{type(model).__name__} averages its loss over each micro-batch and cannot be told the number of "
                "tokens of the whole step, so gradient accumulation would weigh tokens unevenly. Set "
                "train.gradient_accumulation_steps=1, or train.loss=chunked."
            )

    @property
    def trained_model(self) -> PreTrainedModel | PeftModel:
        """The model without what a distributed launch wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    # ---------------------------------------------------------------- optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.optimizer_of(self.trained_model if model is None else model)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        if self.lr_scheduler is None:
            factor = learning_rate_factor(self.schedule, num_training_steps)
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None, "the Trainer makes the schedule after the optimizer"
            self.lr_scheduler = LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---------------------------------------------------------------- one step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        batches, trained_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._interval_steps += 1
        for batch in batches:
            mask = batch.get("attention_mask")
            self._interval_tokens += batch["input_ids"].numel() if mask is None else mask.sum()
        step = self.state.global_step + 1
        if self.on_batches is not None and step in self.watch.steps:
            self.on_batches(step, batches)
        return batches, trained_tokens

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> Tensor | int | None:
        trained_tokens = super()._get_num_items_in_batch(batch_samples, device)
        # A step without trained tokens has loss 0 / 1, not 0 / 0.
        return trained_tokens.clamp(min=1) if isinstance(trained_tokens, Tensor) else trained_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.watch.begin_phase("forward")
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.watch.end_phase()
        # What the Trainer does after this, up to the end of training_step, is the backward pass.
        self.watch.begin_phase("backward")
        return loss

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.end_phase()
        self._interval_loss += loss
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # nothing reads the count, and taking it walks over every parameter

    # ---------------------------------------------------------------- logging and evaluation

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Replace the Trainer's loss, which stays NaN for ever once it was NaN, by this interval's own."""
        if "loss" in logs:
            total = self.accelerator.gather(self._interval_loss.reshape(1)).mean().item()
            logs["loss"] = total / max(self._interval_steps, 1)
            self._interval_loss.zero_()
            self._interval_steps = 0
            logs["tokens"] = self._count_tokens_()
        super().log(logs, start_time)

    def _count_tokens_(self) -> int:
        """Move the tokens of this interval to the state, which checkpoints keep; returns the run's total."""
        self.state.num_input_tokens_seen += int(
            self.accelerator.gather(self._interval_tokens.reshape(1)).sum()
        )
        self._interval_tokens.zero_()
        return self.state.num_input_tokens_seen

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, Any]:
        """Metrics of `evaluator`, kept in `evaluations` by step; {} when it was interrupted."""
        assert self.evaluator is not None, "evaluation is switched on without held-out rows"
        metrics = self.evaluator(self.trained_model) or {}
        if metrics:
            self.evaluations[self.state.global_step] = metrics
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---------------------------------------------------------------- checkpoints

    optimizer_states: Literal["newest", "all"] = "newest"
    """Which of the kept checkpoints keep their optimizer state."""

    _cut_interval: tuple[Tensor, int] | None = None

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
        trial = self.run_folder.unfinished / f"{CHECKPOINT_PREFIX}0"
        shutil.rmtree(trial, ignore_errors=True)
        try:
            with disk_faults_explained("The checkpoint on trial", self.run_folder.newest_checkpoint):
                self._write_trial(trial, total_steps, in_small=in_small)
                seal(trial, step=0)
                verify(trial)
                with safe_globals():  # numpy's types, for the file of the random generators
                    read_back(trial)
        except (FaultError, RefusedError):
            raise
        # Whatever a writer raises for a value it cannot keep is what this trial is for.
        except Exception as error:
            raise FaultError(
                f"What this run would save cannot be saved: {error or type(error).__name__} Nothing was trained yet. "
                "save.probe_at_start: false trains all the same, without checkpoints that can be relied on."
            ) from error
        finally:
            shutil.rmtree(self.run_folder.unfinished, ignore_errors=True)
        return time.perf_counter() - begin

    def _write_trial(self, folder: Path, total_steps: int, *, in_small: bool) -> None:
        folder.mkdir(parents=True)
        save_weights(self.trained_model, folder, in_small=in_small)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        torch.save(state_in_small(self.create_optimizer()), folder / "optimizer.pt")
        stand_in = torch.optim.SGD([torch.zeros(())])
        schedule = LambdaLR(stand_in, learning_rate_factor(self.schedule, total_steps))
        torch.save(schedule.state_dict(), folder / "scheduler.pt")
        self._save_rng_state(str(folder))
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
                super()._load_optimizer_and_scheduler(checkpoint)
            interval = read_interval(Path(checkpoint))
        if not has_state:
            self._advance_schedule_(step_of(Path(checkpoint)) or 0)
        self._interval_loss.fill_(interval.loss)
        self._interval_steps = interval.steps

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
            save_weights(self.trained_model, output_dir)
            self.processing_class.save_pretrained(output_dir)
