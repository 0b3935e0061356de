"""Our optimizers in anyone's `transformers.Trainer`, by one argument.

Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=lowmem.hf.optimizer("galore", lr=1e-4))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from lowmem.errors import RefusedError
from lowmem.hf.launch import SHARDED, launched_strategy
from lowmem.numerics.held_weights import held_weight
from lowmem.optim import LowMemOptimizer, build_optimizer
from lowmem.optim.registry import optimizer_class
from lowmem.optim.settings import settings_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

BuildFromModel = Callable[[nn.Module], LowMemOptimizer]

MIXIN = "Use class MyTrainer(lowmem.hf.LowMemTrainerMixin, Trainer)"

_has_mixin: ContextVar[bool] = ContextVar("has_mixin", default=False)


def optimizer(
    name: str, *, lr: float | None = None, args: TrainingArguments | None = None, **settings: Any
) -> tuple[Callable[[], BuildFromModel], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, in its factory form.

    The Trainer hands the whole model to the factory, so matrices are picked by module and norms and
    biases are not decayed; schedulers, clipping and `resume_from_checkpoint` work as with AdamW.
    `settings` are those of `lowmem.build_optimizer` (target, fallback, head, groups, rank, ...).

    Every value comes from this call, and then `lr` is required; with `args=training_args` the learning
    rate, betas, eps and weight decay that are not given here are taken from it.

    Raises ValueError for an unknown name or setting, at once and not when training starts. When it starts, raises
    RefusedError for a model with int8 weights that a Trainer without `LowMemTrainerMixin` would clip wrongly or, in
    several processes, train apart: it looks at `.grad`, which those do not have.
    """
    known = settings_of(optimizer_class(name))
    chosen = dict(settings)
    if args is not None:
        from_args = {
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        chosen = {**{key: value for key, value in from_args.items() if key in known}, **chosen}
        lr = args.learning_rate if lr is None else lr
    if lr is None:
        raise ValueError(
            f"lowmem.hf.optimizer({name!r}) needs lr=..., or args=training_args to take it from there; "
            "the Trainer's own learning_rate does not reach an optimizer given to it"
        )
    build = _Build(name, lr, chosen, args)
    build(
        _Sample({"attn": nn.Linear(1, 1), "mlp": nn.Linear(1, 1), "head": nn.Linear(1, 1)}), check_only=True
    )
    return build.factory, {}


class _Sample(nn.ModuleDict):
    """The smallest model that settings can be tried on."""

    def get_output_embeddings(self) -> nn.Module:
        return self["head"]


class _Build:
    """Remembers the settings until the Trainer has the model."""

    def __init__(self, name: str, lr: float, settings: dict[str, Any], args: TrainingArguments | None):
        self.name, self.lr, self.settings, self.args = name, lr, settings, args

    def factory(self) -> BuildFromModel:
        """The Trainer calls the first element without arguments and what comes back with the model."""
        return self

    def __call__(self, model: nn.Module, *, check_only: bool = False) -> LowMemOptimizer:
        if not check_only and not _has_mixin.get() and (launched := launched_strategy()) in SHARDED:
            raise RefusedError(
                f"{launched} was launched, which gives an optimizer pieces of matrices, and a Trainer alone does not "
                f"put them together. {MIXIN}."
            )
        if any(held_weight(param) is not None for param in model.parameters()) and not _has_mixin.get():
            _refuse_what_a_bare_trainer_cannot_do(self.args)
        settings = {
            key: value
            for key, value in self.settings.items()
            if not (check_only and key in ("target", "groups"))
        }
        return build_optimizer(model, self.name, lr=self.lr, **settings)


@contextmanager
def from_a_trainer_with_the_mixin() -> Iterator[None]:
    """Optimizers made inside belong to a Trainer that clips and reduces gradients beside parameters, too."""
    token = _has_mixin.set(True)
    try:
        yield
    finally:
        _has_mixin.reset(token)


def _refuse_what_a_bare_trainer_cannot_do(args: TrainingArguments | None) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RefusedError(
            "the model has int8 weights, whose gradients a Trainer in several processes does not reduce: their weights "
            f"would drift apart. {MIXIN}."
        )
    if args is None or args.max_grad_norm:
        found = "not known here" if args is None else f"{args.max_grad_norm:g}"
        raise RefusedError(
            "the model has int8 weights, and a Trainer clips by the norm of the other gradients alone (max_grad_norm "
            f"is {found}, 1.0 where nothing is said). {MIXIN}, or TrainingArguments(max_grad_norm=0) and "
            "lowmem.hf.optimizer(..., args=training_args)."
        )
