"""Our optimizers in anyone's `transformers.Trainer`, by one argument.

Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=lowmem.hf.optimizer("galore", lr=1e-4))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lowmem.optim import LowMemOptimizer, build_optimizer
from lowmem.optim.registry import optimizer_class
from lowmem.optim.settings import settings_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

BuildFromModel = Callable[[nn.Module], LowMemOptimizer]


def optimizer(
    name: str, *, lr: float | None = None, args: TrainingArguments | None = None, **settings: Any
) -> tuple[Callable[[], BuildFromModel], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, in its factory form.

    The Trainer hands the whole model to the factory, so matrices are picked by module and norms and
    biases are not decayed; schedulers, clipping and `resume_from_checkpoint` work as with AdamW.
    `settings` are those of `lowmem.build_optimizer` (target, fallback, rank, ...).

    Every value comes from this call, and then `lr` is required; with `args=training_args` the learning
    rate, betas, eps and weight decay that are not given here are taken from it.

    Raises ValueError for an unknown name or setting, at once and not when training starts.
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
    build = _Build(name, lr, chosen)
    build(nn.ModuleDict({"attn": nn.Linear(1, 1), "mlp": nn.Linear(1, 1)}), check_only=True)
    return build.factory, {}


class _Build:
    """Remembers the settings until the Trainer has the model."""

    def __init__(self, name: str, lr: float, settings: dict[str, Any]):
        self.name, self.lr, self.settings = name, lr, settings

    def factory(self) -> BuildFromModel:
        """The Trainer calls the first element without arguments and what comes back with the model."""
        return self

    def __call__(self, model: nn.Module, *, check_only: bool = False) -> LowMemOptimizer:
        settings = {
            key: value for key, value in self.settings.items() if not (check_only and key == "target")
        }
        return build_optimizer(model, self.name, lr=self.lr, **settings)
