"""lowmem's ways to make a step, in anyone's transformers.Trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from lowmem.errors import FaultError, RefusedError
from lowmem.hf.steps_in_pieces import in_pieces
from lowmem.hf.trainer_override import from_a_trainer_with_the_mixin
from lowmem.memory.wording import size
from lowmem.optim.engine import LowMemOptimizer
from lowmem.recipe.execution_choice import HeadGradient
from lowmem.run.choose import (
    COMPILED_AS_A_WHOLE,
    SCALED,
    Requested,
    chosen_mode,
    consequences,
    execution_class,
    gradient_bytes,
    remark_on_rows,
    situation_of,
)
from lowmem.run.execution import (
    Clip,
    Execution,
    Norms,
    RefreshFrom,
)
from lowmem.run.layouts.attach import StepsInPieces
from lowmem.run.norms import is_finite
from lowmem.run.second_backward import explained

log = logging.getLogger("lowmem")

TOLERATED_IN_A_ROW = 20
"""Steps in a row whose gradients may be not finite; one more stops the run."""


class LowMemTrainerMixin:
    """Put before a Trainer: `class MyTrainer(LowMemTrainerMixin, SFTTrainer)`, with an optimizer of lowmem's.

        MyTrainer(..., optimizer_cls_and_kwargs=lowmem.hf.optimizer("galore", lr=1e-4, rank=256), execution="project")

    Gradient accumulation, `max_grad_norm`, schedulers and resume work in every execution; the loss and the logged
    gradient norm stay the Trainer's. `clip` says what `max_grad_norm` limits: the norm of what the rules use
    (`applied`, projected gradients where there are any), of the whole gradients (`full`), or each parameter's
    gradient by itself (`tensor`). A step whose gradients are not finite is left out and counted.

    Raises RefusedError when training begins with a combination that cannot work.
    """

    def __init__(
        self,
        *args: Any,
        execution: Requested = "auto",
        clip: Clip = "applied",
        refresh_from: RefreshFrom = "boundary",
        head_gradient: HeadGradient = "auto",
        **kwargs: Any,
    ):
        self.requested_execution: Requested = execution
        self.clip: Clip = clip
        self.refresh_from: RefreshFrom = refresh_from
        self.head_gradient: HeadGradient = head_gradient
        self.execution: Execution | None = None
        self.norms = Norms(None, None)
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self.execution_summary = "execution: plain"
        self.steps_in_pieces: StepsInPieces | None = None
        self._is_first_micro_batch = True
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with from_a_trainer_with_the_mixin():
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)  # type: ignore[misc]
        trained: nn.Module = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # type: ignore[attr-defined]
            self.steps_in_pieces, self.execution_summary = in_pieces(self, optimizer, trained)
        elif self.execution is None:
            self.execution = self._begin_execution(optimizer, trained)
        return optimizer

    def _begin_execution(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Execution | None:
        if not isinstance(optimizer, LowMemOptimizer):
            if self.requested_execution in ("auto", "plain"):
                return None
            raise RefusedError(
                f"train.execution: {self.requested_execution} needs an optimizer of lowmem's, and this one is "
                f"{type(optimizer).__name__}. Use lowmem.hf.optimizer(...), or train.execution: plain."
            )
        args: Any = self.args  # type: ignore[attr-defined]
        micro_batches = args.gradient_accumulation_steps
        max_norm = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None
        at = situation_of(
            optimizer,
            micro_batches=micro_batches,
            clip=self.clip,
            max_norm=max_norm,
            keeps_gradients=what_keeps_gradients(self.accelerator, model),  # type: ignore[attr-defined]
        )
        mode = chosen_mode(self.requested_execution, at)
        make = execution_class(mode, self.head_gradient)
        execution = make(optimizer, clip=self.clip, max_norm=max_norm, refresh_from=self.refresh_from)
        execution.attach(model)
        nbytes = gradient_bytes(optimizer, mode, at)
        self.execution_summary = (
            f"execution: {mode}, gradients take {size(nbytes)}: {consequences(mode, at)}"
            + remark_on_rows(optimizer, mode, at)
        )
        log.info(self.execution_summary)
        return execution

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        is_last: bool = self.accelerator.sync_gradients  # type: ignore[attr-defined]
        if self.execution is not None:
            self.execution.begin_micro_batch(is_first=self._is_first_micro_batch, is_last=is_last)
        try:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            refusal = None if self.execution is None else explained(error, self.execution.mode)
            if refusal is None:
                raise
            raise refusal from error
        self._is_first_micro_batch = is_last
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if self.execution is not None and torch.is_grad_enabled():
            loss = result[0] if isinstance(result, tuple) else result
            self.execution.note_loss(loss.detach())
        return result

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.execution is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return None  # `_get_grad_norm` comes next in every case

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.execution is None:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
            return norm if self.steps_in_pieces is None else self._known_of_pieces(norm)
        self.norms = self.execution.finish_backward()
        norms = self.norms
        norm = norms.full if self.execution.clip == "full" or norms.applied is None else norms.applied
        if self.execution.not_finite or (norm is not None and not is_finite(norm)):
            self._leave_step_out(self.execution)
        else:
            self._skipped_in_a_row = 0
        return norm

    def _known_of_pieces(self, norm: Any) -> Any:
        """The norm that FSDP2 or DeepSpeed has taken, of whole gradients; a step without a finite one is left out."""
        if norm is None:
            return None
        full = norm if isinstance(norm, Tensor) else torch.tensor(float(norm))
        self.norms = Norms(None, full)
        if not is_finite(full):
            assert self.steps_in_pieces is not None
            self.steps_in_pieces.optimizer.skip_next_step()
            self._count_left_out("the norm of its gradients is not finite")
        else:
            self._skipped_in_a_row = 0
        return norm

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the norms of the last step that are known, before clipping, under their names."""
        if "loss" in logs:
            norms = {"applied_grad_norm": self.norms.applied, "full_grad_norm": self.norms.full}
            logs |= {name: norm.item() for name, norm in norms.items() if norm is not None}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _says_where_to_go_on(self) -> str:
        newest = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        return "There is no checkpoint yet." if newest is None else f"The last checkpoint is {newest}."

    def _leave_step_out(self, execution: Execution) -> None:
        """Raises FaultError when this has happened too often in a row."""
        execution.optimizer.skip_next_step()
        what = (
            "is left out"
            if execution.mode != "fused"
            else f"leaves out gradients of {len(execution.not_finite)} parameters"
        )
        self._count_left_out(f"the gradient of {execution.first_not_finite()} is not finite", what)

    def _count_left_out(self, reason: str, what: str = "is left out") -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        log.warning("step %d %s: %s", step, what, reason)
        if self._skipped_in_a_row > TOLERATED_IN_A_ROW:
            raise FaultError(
                f"Gradients of {self._skipped_in_a_row} steps in a row were not finite; at step {step} {reason}. Lower "
                f"optimizer.lr, or look for broken rows in the data. {self._says_where_to_go_on()}"
            )


def what_keeps_gradients(accelerator: Accelerator, model: nn.Module) -> str | None:
    """Why a Trainer's gradients are all there at the step, whatever the hooks do."""
    if accelerator.scaler is not None:
        return SCALED
    compiles = accelerator.state.dynamo_plugin
    will_be_compiled = compiles.backend != DynamoBackend.NO and not compiles.use_regional_compilation
    return COMPILED_AS_A_WHOLE if will_be_compiled or hasattr(model, "_orig_mod") else None
