"""transformers.Trainer with lowmem's optimizer, schedule, evaluation, memory meter and safe checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lowmem.errors import RefusedError
from lowmem.hf.metering import StepWatch
from lowmem.hf.run_folder import RunFolder
from lowmem.hf.schedule import learning_rate_factor
from lowmem.hf.sharded_trainer import ShardedTrainer
from lowmem.hf.trainer_mixin import LowMemTrainerMixin
from lowmem.recipe.execution_choice import HeadGradient
from lowmem.recipe.schema import SchedulerRecipe
from lowmem.run.choose import Requested
from lowmem.run.execution import Clip, RefreshFrom

Batch = dict[str, Tensor]
Evaluator = Callable[[nn.Module], dict[str, float | None] | None]


class LowMemTrainer(LowMemTrainerMixin, ShardedTrainer):
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
        head_gradient: HeadGradient = "auto",
    ):
        super().__init__(
            execution=execution,
            clip=clip,
            refresh_from=refresh_from,
            head_gradient=head_gradient,
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
