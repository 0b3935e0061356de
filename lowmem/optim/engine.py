"""The one optimizer engine. Every algorithm is a `LowMemOptimizer` that differs only in its rule.

A step of one parameter reads: load -> refresh? -> update -> save -> write back. `step()` loops over
`step_param`, and a backward hook may call the same function, so both make the same bits. A hook may also
call `project_grad_`, which makes the first half of that (refresh?, project) and frees the gradient, or
`accumulate_grad_`, which adds it to the state; then `step_param` goes on from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowmem.numerics.held_weights import drop_grad_, grad_of, held_weight, numel_of, shape_of
from lowmem.numerics.row_gradients import gradient_of
from lowmem.optim import registry
from lowmem.optim.micro_batches import accumulation_of
from lowmem.optim.optimizer_state import OptimizerState
from lowmem.optim.param_groups import check_params, drop_settings_of_others_, filled_group, refuse_sharded
from lowmem.optim.rule import Context, Rule, Shape
from lowmem.optim.storage import WHOLE, LoadedState, accumulator_dtype
from lowmem.optim.torch_kernels import step_with_torch_
from lowmem.optim.writeback import parts_of, write_

FoundElsewhere = Callable[
    [Tensor, Rule, Context, Callable[[], dict[str, Tensor]]], tuple[dict[str, Tensor], bool]
]


class LowMemOptimizer(OptimizerState):
    """Base of every optimizer here; use a subclass, or `build_optimizer`.

    A param group holds numbers and strings only: the settings of its algorithm, which may be another
    than the optimizer's own (`group["algorithm"]`), so that embeddings can have their own rule.
    `state[param]` holds tensors only, under torch's names, plus `step`, the number of updates.

    Raises ValueError at construction for a setting out of range, an unknown setting, a sparse or
    complex parameter.
    """

    algorithm: ClassVar[str]
    """The name in the registry."""

    treats_matrices: ClassVar[bool] = False
    """Whether `build_optimizer` gives it the linear layers only and the rest to the fallback."""

    formats: ClassVar[Mapping[str, str]] = {}
    """How state of each role is stored where the algorithm has no `storage` setting."""

    rests: ClassVar[bool] = False
    """Whether parameters that have state in turn use no gradient while it is not theirs."""

    steps_in_pieces: Callable[[LowMemOptimizer], None] | None = None
    """Who makes the steps where each process has a piece of each parameter."""

    refresh_owners: FoundElsewhere | None = None
    """Who has one process of several do what `Rule.refresh` does; see `run.refresh_owners`."""

    def __init__(self, params: Iterable[Any], settings: dict[str, Any]):
        self._forget()
        super().__init__(params, dict(settings))

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        """The rule for a parameter of `shape` under the group's settings."""
        raise NotImplementedError("LowMemOptimizer is abstract: use a subclass from lowmem.optim")

    @staticmethod
    def turn_length(group: dict[str, Any]) -> int | None:
        """For how many steps the same parameters have state, where they have it in turn; None where all always have.

        Turns are counted by the steps of the group, which `group["steps"]` keeps; the rule of a turn is
        `rule(group, shape).in_turn(turn)`. A step left out counts for no turn.
        """
        return None

    @staticmethod
    def blocks(groups: Sequence[dict[str, Any]]) -> list[list[tuple[int, int]]]:
        """Where parameters have state in turn: which block each of each group is of, numbered from 0, and of how many.

        `groups` are all that have this algorithm. By default each parameter is a block, and each group for itself.
        """
        sizes = [len(group["params"]) for group in groups]
        return [[(index, size) for index in range(size)] for size in sizes]

    @staticmethod
    def remark(group: dict[str, Any], shape: Shape) -> str | None:
        """What a user should know about how a parameter of `shape` is treated, or None."""
        return None

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but settings are checked and an unknown one is an error."""
        owner = registry.optimizer_class(param_group.get("algorithm", self.algorithm))
        filled = filled_group(
            owner, param_group, self.defaults, of_own_algorithm=owner.algorithm == self.algorithm
        )
        super().add_param_group(filled)
        drop_settings_of_others_(owner, filled)
        check_params(owner, filled["params"], filled)
        for param in filled["params"]:
            if (held := held_weight(param)) is not None:
                held.trainer = weakref.ref(self)
        owner.settle_groups(self.param_groups)
        self._blocks.clear()

    @staticmethod
    def settle_groups(groups: list[dict[str, Any]]) -> None:
        """Derive what depends on all parameters at once; called after each added group."""

    # ---------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. `closure` is evaluated once, with gradients on.

        After `skip_next_step()` nothing is updated and what was projected is dropped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._skips:
            self._skips = False
            self.projected.clear()
            self._keep_refreshes()
            self._drop_held_gradients()
            return loss
        if self.steps_in_pieces is not None:
            self.steps_in_pieces(self)
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                refuse_sharded(param)
                self.step_param(param, group)
        self._drop_held_gradients()
        for group in self.param_groups:
            self._count_step_of_turn(group, group["params"])
        return loss

    def _drop_held_gradients(self) -> None:
        """A Trainer's `model.zero_grad()` knows `.grad` alone, so those beside it are freed when they were used."""
        for group in self.param_groups:
            for param in group["params"]:
                if (held := held_weight(param)) is not None:
                    held.grad = None

    @torch.no_grad()
    def step_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter from what was made of its gradients, and from its gradient; without any do nothing."""
        projected = self.projected.pop(param, None)
        grad: Any = gradient_of(param)
        has_sum = bool(self.accumulated.pop(param, 0))
        if numel_of(param) == 0 or (grad is None and projected is None and not has_sum):
            return
        rule = self.rule_of(param, group)
        if not rule.needs_gradient:
            return
        stored = self._stored(param, group, rule)
        ctx = self._next_context(param, group)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        rounding = self._rounding(param, group, ctx, "rounding")
        codecs, shape = self._codecs(param, group, rule), shape_of(param)
        whole = LoadedState(stored, codecs, rule.slots(shape), WHOLE, rounding)
        if projected is not None:
            direction, changed = rule.update_projected(projected.float(), shape, whole, ctx)
            whole.save_(changed, rounding)
            write_(param, direction, lr=lr, weight_decay=weight_decay, generator=rounding)
            return
        if has_sum:
            accumulation = accumulation_of(self, param, group, ctx)
            accumulation.finish_(grad, lr=lr, weight_decay=weight_decay, rounding=rounding)
            return
        assert grad is not None
        if grad.is_sparse:
            raise ValueError("sparse gradients are not supported; use torch.nn.Embedding(sparse=False)")
        self._refresh(param, group, rule, whole, ctx)
        exact = rounding is None or param.dtype in (torch.float32, torch.float64)
        if (
            exact
            and held_weight(param) is None
            and step_with_torch_(rule, param, grad, stored, step=ctx.step, lr=lr, weight_decay=weight_decay)
        ):
            return
        if rule.scope == "matrix":
            direction, changed = rule.update(grad, whole, ctx)
            whole.save_(changed, rounding)
            write_(param, direction, lr=lr, weight_decay=weight_decay, generator=rounding)
            return
        for part, slice_of_grad, write_part_ in parts_of(param, grad):
            state = LoadedState(stored, codecs, rule.slots(shape), part)
            direction, changed = rule.update(slice_of_grad.float(), state, ctx)
            write_part_(direction, lr=lr, weight_decay=weight_decay, generator=rounding)
            state.save_(changed, rounding)

    @torch.no_grad()
    def project_grad_(
        self, param: Tensor, group: dict[str, Any], *, dtype: torch.dtype | None = None
    ) -> None:
        """Add `.grad`, projected, to `projected[param]` and free it; for a rule that `is_projected`.

        The first gradient of a step refreshes the basis where one is due. `dtype` is that of a new
        `projected[param]`, by default the group's `accumulator`.
        """
        grad = grad_of(param)
        if grad is None or numel_of(param) == 0:
            return
        rule, whole = self.rule_of(param, group), self._loaded(param, group)
        if param not in self.projected:
            self._refresh(param, group, rule, whole, self.coming_context(param, group))
        projected = rule.project(grad, whole)
        drop_grad_(param)
        if param in self.projected:
            self.projected[param].add_(projected)
        else:
            self.projected[param] = projected.to(
                dtype or accumulator_dtype(group["accumulator"], param.dtype)
            )

    @torch.no_grad()
    def accumulate_grad_(self, param: Tensor, group: dict[str, Any]) -> None:
        """Add `.grad` of a micro-batch to the state and free it, where `micro_batches.may_accumulate` says so."""
        grad, number = grad_of(param), self.accumulated.get(param, 0)
        if grad is None or numel_of(param) == 0:
            return
        ctx = self.coming_context(param, group)
        rounding = self._rounding(param, group, ctx, f"micro-batch {number}")
        accumulation_of(self, param, group, ctx).add_(grad, is_first=number == 0, rounding=rounding)
        drop_grad_(param)
        self.accumulated[param] = number + 1

    @torch.no_grad()
    def refresh_basis_(self, param: Tensor, group: dict[str, Any], grad: Tensor | None = None) -> None:
        """Refresh what is due for the coming update from `grad`, or `.grad` as it is now, and not again then."""
        ctx = self.coming_context(param, group)
        self._refresh(param, group, self.rule_of(param, group), self._loaded(param, group), ctx, grad)

    def _refresh(
        self,
        param: Tensor,
        group: dict[str, Any],
        rule: Rule,
        whole: LoadedState,
        ctx: Context,
        grad: Any = None,
    ) -> None:
        if rule.needs_refresh(ctx) and self._refreshed.get(param) != ctx.step:
            grad = gradient_of(param) if grad is None else grad
            assert grad is not None
            rule.begin_refresh_(whole, ctx)
            find = partial(rule.refresh, grad, whole, ctx)
            owners = self.refresh_owners
            changed, is_received = (find(), False) if owners is None else owners(param, rule, ctx, find)
            whole.save_(changed, self._rounding(param, group, ctx, "refresh"))
            if is_received:
                ctx.forget()
                rule.recall(whole, ctx)
            self._refreshed[param] = ctx.step
            (self._refreshed_in_vain.discard if changed else self._refreshed_in_vain.add)(param)

    def skip_next_step(self) -> None:
        """Let the next `step()` leave everything as it is: its gradients are of no use."""
        self._skips = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.projected.clear()
        self.accumulated.clear()
        self._drop_held_gradients()
