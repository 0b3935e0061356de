"""What happens at a run's events besides training: the log, the meter's borders, the reasons to stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.errors import FaultError
from lowmem.hf.interrupt import Interrupt
from lowmem.hf.metering import StepWatch
from lowmem.hf.metrics import MetricsFile
from lowmem.hf.progress import Progress
from lowmem.hf.run_folder import RunFolder

TOLERATED_NON_FINITE_ROWS = 20


class RunLog(TrainerCallback):
    """Rows of metrics.jsonl and the progress line; on the main process only.

    `peak_bytes()` gives the largest peak measured so far, None while there is none. Time spent in
    evaluations and checkpoints does not count as training time.
    """

    def __init__(self, metrics: MetricsFile, peak_bytes: Callable[[], int | None]):
        self.metrics = metrics
        self.peak_bytes = peak_bytes
        self.seconds = 0.0
        self.row_seconds, self.row_tokens = 0.0, 0
        self.running_since: float | None = None
        self.progress: Progress | None = None

    def _pause(self) -> None:
        if self.running_since is not None:
            self.seconds += time.monotonic() - self.running_since
            self.running_since = None

    def _run(self) -> None:
        self.running_since = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress = Progress(state.global_step, state.max_steps)
        self.row_tokens = state.num_input_tokens_seen
        self.seconds = self.row_seconds = self.metrics.training_seconds()
        self._run()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.running_since is None:
            self._run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.progress is not None
        self.progress.advance(state.global_step)
        if (control.should_evaluate or control.should_save) and not control.should_log:
            self._pause()  # with a row due, on_log does it, after the device has caught up

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        assert self.progress is not None
        self._pause()
        elapsed = self.seconds - self.row_seconds
        norms = {name: logs.get(name) for name in ("grad_norm", "applied_grad_norm", "full_grad_norm")}
        row = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            **{name: None if norm is None else float(norm) for name, norm in norms.items()},
            "tokens": logs["tokens"],
            "tokens_per_second": (logs["tokens"] - self.row_tokens) / elapsed if elapsed > 0 else None,
            "peak_allocated_bytes": self.peak_bytes(),
            "seconds": self.seconds,
        }
        self.row_seconds, self.row_tokens = self.seconds, logs["tokens"]
        self.metrics.append(row)
        self.progress.show(state.global_step, row)
        # What comes before the next step is an evaluation or a checkpoint: on_step_begin starts the clock.

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        if not metrics:
            return  # it was interrupted
        self.metrics.forget_evaluation_(state.global_step)
        self.metrics.append({"step": state.global_step, **metrics})
        names = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "exact_match": "exact match"}
        shown = ", ".join(
            f"{names[name]} {value:.4g}" for name, value in metrics.items() if value is not None
        )
        text = f"step {state.global_step}  {shown}"
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.progress.say(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.progress is not None
        self.progress.close()


class MeterBorders(TrainerCallback):
    """Tells the meter where a step and its optimizer phase begin and end."""

    def __init__(self, watch: StepWatch):
        self.watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.choose_steps(state.global_step + 1, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.begin_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.begin_phase("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.end_phase()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.end_step()


class StopOnInterrupt(TrainerCallback):
    """Grants a requested stop at the step boundary, with a last row and a checkpoint, on every process alike."""

    def __init__(self, interrupt: Interrupt):
        self.interrupt = interrupt
        self.granted = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._grant(args, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer saves after it evaluated, so a request during the evaluation needs no further step.
        if state.global_step > 0:
            self._grant(args, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Nor does one during a save: its checkpoint is there. Who sends SIGTERM may not wait for another.
        if self.requested_anywhere(args):
            self.granted = True
            control.should_training_stop = True

    def requested_anywhere(self, args: TrainingArguments) -> bool:
        """Whether any process was asked to stop; to be called by all of them."""
        if args.world_size == 1:
            return self.interrupt.requested
        return bool(reduce(torch.tensor(int(self.interrupt.requested), device=args.device), "sum").item())

    def _grant(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self.requested_anywhere(args):
            self.granted = True
            control.should_log = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True


class LogLastStep(TrainerCallback):
    """A row for the last step, whether or not log_every divides it."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class EvaluateEvery(TrainerCallback):
    """An evaluation each `steps` steps. The one at the end is made after the final model was saved."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True


class StopOnNonFinite(TrainerCallback):
    """Raises FaultError when the loss of 20 logged rows in a row was not a finite number."""

    def __init__(self, run_folder: RunFolder):
        self.run_folder = run_folder
        self.in_a_row = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self.in_a_row = 0 if math.isfinite(logs["loss"]) else self.in_a_row + 1
        if self.in_a_row >= TOLERATED_NON_FINITE_ROWS:
            newest = self.run_folder.newest_checkpoint()
            saved = f"The last checkpoint is {newest}" if newest else "There is no checkpoint"
            raise FaultError(
                f"The loss has not been a finite number for {self.in_a_row} logged steps, up to step "
                f"{state.global_step}. {saved}; it may hold non-finite weights too if it is newer than the first "
                "NaN in metrics.jsonl. Lower optimizer.lr, or lengthen the warm-up, and start afresh."
            )
