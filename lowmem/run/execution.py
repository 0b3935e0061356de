"""How a step happens while its gradients arrive: what the backward hooks do, and what is left for the boundary.

    plain     gradients stay until the boundary
    project   the gradient of a matrix with a low-rank rule is projected as it arrives and freed
    fused     each parameter is updated as its gradient arrives, and the gradient is freed

A Trainer tells where it is:

    execution.begin_micro_batch(is_first, is_last)      before each forward
    norms = execution.finish_backward()                 at the boundary, before optimizer.step()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem.errors import RefusedError
from lowmem.numerics.held_weights import grad_of, held_tensors, held_weight, numel_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.run.norms import clip_each_, clip_to_, norm_of
from lowmem.run.refresh_owners import RefreshOwners
from lowmem.run.resting import Resting
from lowmem.run.same_weights import refuse_different_weights
from lowmem.run.second_backward import second_backward

Mode = Literal["plain", "project", "fused"]
Clip = Literal["applied", "full", "tensor"]
RefreshFrom = Literal["boundary", "first_micro_batch"]

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


@dataclass(frozen=True)
class Norms:
    """Norms of a step's gradients; None where it cannot be known, never 0."""

    applied: Tensor | None
    """Of what the rules use: projected gradients, and whole ones where there is no projection."""
    full: Tensor | None
    """Of the whole gradients."""


class Execution:
    """One way to make steps of `optimizer`, which must be the model's only one.

    max_norm: what the norm of `clip` is clipped to, None for no clipping. With `tensor` every gradient is
    clipped by itself, to its share. refresh_from: whether a basis that is due is fitted to the step's whole
    gradient, or to that of its first micro-batch; a parameter's first basis always comes from the latter.
    """

    mode: Mode = "plain"
    frees_gradients = False
    """Then the matrices leave the reducer of data parallel training, which would write gradients back."""

    def __init__(
        self,
        optimizer: LowMemOptimizer,
        *,
        clip: Clip = "applied",
        max_norm: float | None = None,
        refresh_from: RefreshFrom = "boundary",
    ):
        self.optimizer = optimizer
        self.clip, self.max_norm, self.refresh_from = clip, max_norm, refresh_from
        # By number: loading a state puts other groups in the place of these.
        self._groups = {
            param: number for number, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self._total_numel = sum(numel_of(param) for param in self._groups)
        self._handles: list[Any] = []
        self._is_first = self._is_last = True
        self._is_boundary_only = True
        self._drops = False
        self._arrived: set[Tensor] = set()
        self.not_finite: dict[Tensor, None] = {}
        """Parameters with gradients in this step that were not finite and not used, as far as hooks have seen."""
        self._full_squares: Tensor | None = None
        self._processes = _world_size()
        self._resting = Resting(optimizer, (), self.group_of)
        self._reduced_at_boundary: set[Tensor] = set()

    # ---------------------------------------------------------------- what a Trainer calls

    def attach(self, model: nn.Module) -> None:
        """Hook the trained parameters; before the model is wrapped for data parallel training."""
        trained = [param for param in self._groups if param.requires_grad]
        self._resting = Resting(self.optimizer, trained, self.group_of)
        mine = [param for param in trained if self.handles(param)]
        if self._processes > 1:
            mine = self._leave_reducer(model, trained, mine)
            self.optimizer.refresh_owners = RefreshOwners(trained)
        hook = weakly(self._on_gradient)
        self._handles = [param.register_post_accumulate_grad_hook(hook) for param in mine]

    def _leave_reducer(self, model: nn.Module, trained: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
        """Have data parallel training ignore what is reduced here, and held weights, which it knows nothing of.

        Gives the parameters of `mine` that are still this way's: a reducer refuses to have nothing to reduce, so
        it keeps the smallest ordinary one, which is stepped at the boundary.
        """
        ordinary = [param for param in trained if held_weight(param) is None]
        if not ordinary:
            raise RefusedError(
                "data parallel training needs a trained weight that is not in int8, and this model has none. "
                "Train its norms too."
            )
        leaving = set(mine) if self.frees_gradients else set()
        self._reduced_at_boundary = set(self._resting.params) - leaving
        leaving |= self._reduced_at_boundary
        if leaving.issuperset(ordinary):
            leaving.remove(smallest := min(ordinary, key=numel_of))
            mine = [param for param in mine if param is not smallest]
            self._reduced_at_boundary.discard(smallest)
            self._resting.leave_to(smallest)
        held = held_tensors(model)
        refuse_different_weights(held)
        ours = {
            name
            for name, param in model.named_parameters()
            if param in leaving or held_weight(param) is not None
        }
        ignored = {*getattr(model, _IGNORED_BY_DDP, ()), *held, *ours}
        if ignored:
            setattr(model, _IGNORED_BY_DDP, ignored)
        return mine

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._resting.end_step()

    def begin_micro_batch(self, *, is_first: bool, is_last: bool) -> None:
        self._is_first, self._is_last = is_first, is_last
        self._drops = False
        self._arrived.clear()
        if is_first:
            self._resting.begin_step()
            self.not_finite = {}
            self._full_squares = None
            self._is_boundary_only = is_last

    def note_loss(self, loss: Tensor) -> None:
        """Tell the loss of the micro-batch under way, before its backward pass.

        A way that uses gradients before the boundary frees those of a loss that is not finite without using them;
        the others leave out the whole step. On several processes all must call it.
        """

    def first_not_finite(self) -> str | None:
        """The name of a parameter whose gradient, held or seen, is not finite."""
        held = ((param, self.optimizer.projected.get(param, grad_of(param))) for param in self._groups)
        broken = (p for p, grad in held if grad is not None and not bool(torch.isfinite(grad).all()))
        param = next(iter(self.not_finite), None)
        param = next(broken, None) if param is None else param
        return None if param is None else self.optimizer.place_of(param)[0]

    @torch.no_grad()
    def finish_backward(self) -> Norms:
        """Reduce over processes, clip, and give the norms; to be called once, before `optimizer.step()`."""
        self._resting.end_step()
        self._resting.drop_gradient_()
        self._reduce_projected()
        self._reduce_held()
        full = self._full_norm()
        if self._clips_applied():
            self._project_rest()
        applied = self._held()
        norm = norm_of(applied) if applied else None
        if self.max_norm is not None:
            if self.clip == "tensor":
                self._clip_each()
            else:
                reference = full if self.clip == "full" else norm
                assert reference is not None, "a norm that cannot be known was asked for"
                clip_to_(applied, reference, self.max_norm)
        return Norms(None if self._some_is_projected_later() else norm, full)

    # ---------------------------------------------------------------- what the ways differ in

    def handles(self, param: Tensor) -> bool:
        """Whether this way does something with `param`'s gradient before the boundary."""
        return self.is_projected(param)

    def on_gradient(self, param: Tensor) -> None:
        """The gradient of a micro-batch has been added to `param.grad`."""
        if self._refreshes_from_this_micro_batch(param):
            self._reduce(grad_of(param))
            self.optimizer.refresh_basis_(param, self.group_of(param))

    # ---------------------------------------------------------------- shared pieces

    def group_of(self, param: Tensor) -> dict[str, Any]:
        return self.optimizer.param_groups[self._groups[param]]

    def is_projected(self, param: Tensor) -> bool:
        return self.optimizer.rule_of(param, self.group_of(param)).is_projected

    def _on_gradient(self, param: Tensor) -> None:
        if self.frees_gradients:
            if param in self._arrived:
                raise second_backward(self.mode, self.optimizer.place_of(param)[0])
            self._arrived.add(param)
        with torch.no_grad():
            self.on_gradient(param)

    def _refreshes_from_this_micro_batch(self, param: Tensor) -> bool:
        """Whether a basis is due that comes from the first micro-batch and not from the whole step's gradient.

        A rule that needs the whole gradient anyway has its basis from that.
        """
        if not self._is_first or self._is_boundary_only or not self.is_projected(param):
            return False
        ctx = self.optimizer.coming_context(param, self.group_of(param))
        is_due = self.optimizer.rule_of(param, self.group_of(param)).refresh_is_due(ctx)
        return is_due and (ctx.step == 1 or self.refresh_from == "first_micro_batch")

    def _waits_for_whole_gradient(self, param: Tensor) -> bool:
        """Whether a basis is due that comes from the whole step's gradient, which is not there yet."""
        ctx = self.optimizer.coming_context(param, self.group_of(param))
        is_due = self.optimizer.rule_of(param, self.group_of(param)).refresh_is_due(ctx)
        return is_due and ctx.step > 1 and self.refresh_from == "boundary" and not self._is_last

    def _clips_applied(self) -> bool:
        return self.clip in ("applied", "tensor") and self.max_norm is not None

    def _project_rest(self) -> None:
        """Project what arrived whole, so that its norm is that of what is applied."""
        for param in self._groups:
            if grad_of(param) is not None and self.is_projected(param):
                self.optimizer.project_grad_(param, self.group_of(param), dtype=torch.float32)

    def _some_is_projected_later(self) -> bool:
        """Whether rules project gradients in the step that are whole until then, so that nobody knows what they use."""
        whole = (param for param in self._groups if grad_of(param) is not None)
        return any(param not in self.optimizer.projected and self.is_projected(param) for param in whole)

    def _held(self) -> list[Tensor]:
        return [*self.optimizer.projected.values(), *self._whole_gradients()]

    def _whole_gradients(self) -> list[Tensor]:
        gradients = (grad_of(param) for param in self._groups)
        return [grad for grad in gradients if grad is not None]

    def _full_norm(self) -> Tensor | None:
        if not self.optimizer.projected:
            held = self._held()
            return norm_of(held) if held else None
        return None

    def _clip_each(self) -> None:
        assert self.max_norm is not None
        for param in self._groups:
            held = self.optimizer.projected.get(param, grad_of(param))
            if held is not None:
                clip_each_(held, self.max_norm, numel_of(param), self._total_numel)

    def _reduce_projected(self) -> None:
        for projected in self.optimizer.projected.values():
            self._reduce(projected)

    def _reduce_held(self) -> None:
        """No reducer knows of the gradients beside parameters, and none may wait for those that rest."""
        for param in self._groups:
            if held_weight(param) is not None or param in self._reduced_at_boundary:
                self._reduce(grad_of(param))

    def _reduce(self, tensor: Tensor | None) -> None:
        """Average over the processes of data parallel training."""
        if tensor is not None and self._processes > 1:
            dist.all_reduce(tensor)
            tensor.div_(self._processes)


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep its object alive: a tensor's hooks are hidden from the garbage collector."""
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        if (alive := reference()) is not None:
            alive(param)

    return hook


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
