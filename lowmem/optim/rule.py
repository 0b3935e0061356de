"""The contract between an algorithm and the engine: gradient in, descent direction out.

A `Rule` knows neither learning rate nor weight decay, neither the parameter's dtype nor how its
state is stored. The engine loads the declared state as float32, calls the rule, stores the state and
writes the direction into the weight; that is why one rule serves float32 and bfloat16 weights, any
state format, and any way of executing a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from lowmem.optim.context import Context as Context

Shape = tuple[int, ...]
Role = Literal["moment", "variance", "basis", "factor", "scalar", "moment_codes", "variance_codes"]
"""`factor` and `scalar` are float32 whatever the storage: one value a row or a column, and single numbers.

`moment_codes` and `variance_codes` are the 8-bit codes of a library whose kernel makes the rule's update.
"""
Scope = Literal["element", "matrix"]


@dataclass(frozen=True)
class Slot:
    """State that a rule declares but does not allocate. The role decides how it may be stored."""

    shape: Shape
    role: Role = "moment"


class State(Mapping[str, Tensor]):
    """A parameter's state as a rule sees it: float32, loaded when asked for."""

    def rows(self, name: str, index: int, rows: slice) -> Tensor:  # (rows, columns)
        """Some rows of a slot of the parameter's shape; `index` says which matrix of a batch."""
        raise NotImplementedError(f"{type(self).__name__} gives whole tensors only")

    def save_rows_(self, name: str, index: int, rows: slice, value: Tensor) -> None:
        """Keep `value` as these rows."""
        raise NotImplementedError(f"{type(self).__name__} gives whole tensors only")

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes of a slot, and the scales of their blocks, as they lie in memory, for a kernel that changes them."""
        raise NotImplementedError(f"{type(self).__name__} gives float32 only")

    def zero_(self, name: str) -> None:
        """Make a slot what it was at first, without loading it."""
        raise NotImplementedError(f"{type(self).__name__} gives whole tensors only")


class Factors(NamedTuple):
    """A direction of the weight's shape that is never formed: scale * left @ right.

    Leading dimensions, if any, count the matrices of a batch (the experts of a mixture).
    """

    left: Tensor  # (..., rows, r)
    right: Tensor  # (..., r, columns)
    scale: float


@dataclass(frozen=True)
class RowBlocks:
    """A direction of the weight's shape that is made a few rows at a time and never held whole.

    `of(index, rows)` gives the rows of a matrix, `index` saying which one of a batch (0 where there is one).
    Write-back asks for every block once, in order.
    """

    of: Callable[[int, slice], Tensor]  # -> (rows, columns) float32; may be the gradient's own memory


Direction = Tensor | Factors | RowBlocks


class Turn(NamedTuple):
    """Where blocks of parameters have state in turn: which turn it is, counted from 0, and which block is asked for."""

    number: int
    block: int
    blocks: int
    seed: int


class OnRows(NamedTuple):
    """How the rows of a matrix are updated where every process has some: `rule` on these, with `ctx.share`."""

    rule: Rule
    """Its slots, for the shape of some rows, are the state of these."""

    summed: int = 0
    """Values that all processes add up in an update."""

    repeated: int = 0
    """Values of state that every process has."""

    whole_every: int = 0
    """Steps, at least, between two in which `refresh` sees the whole gradient everywhere; 0 if never."""


class Rule:
    """gradient -> descent direction.

    `scope` answers three questions at once. "element": entry i of the direction depends on entry i of
    gradient and state (and on scalars) only, so the rule may run on slices and on flat shards.
    "matrix": it needs the whole tensor.

    An element rule gets float32 slices. A matrix rule gets the gradient in its own dtype and whole, and
    multiplies through `numerics.tiles` or goes through its rows by `row_slices`, so that no float32 copy of it is
    made; a direction that is neither small nor a product is given as `RowBlocks` for the same reason.
    Gradients are never changed in place; loaded state may be.
    """

    scope: ClassVar[Scope] = "element"

    is_projected: ClassVar[bool] = False
    """Whether `update` sees the gradient through `project` alone, so that it may be projected as it arrives."""

    needs_gradient: ClassVar[bool] = True
    """False where there is nothing to do with a gradient, so that none need be made."""

    refreshes_from_gradient: ClassVar[bool] = True
    """Whether `refresh` asks for the whole gradient, rather than for its shape or for sums."""

    sums_in_refresh: ClassVar[int] = 0
    """How many float64 numbers `refresh` adds up by one `ctx.share.sum_`, each time and before all else, over all who
    have a piece of the parameter."""

    def on_rows(self, shape: Shape) -> OnRows | None:
        """How rows of a matrix of `shape` (m, n) are updated apart from each other; None where all are needed."""
        return None

    def in_turn(self, turn: Turn) -> Rule:
        """The rule of a block in a turn, for optimizers with a `turn_length`. Its own state begins with the turn."""
        return self

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """The state for a parameter of `shape`, so that its bytes are known without allocating it."""
        return {}

    def recall(self, state: State, ctx: Context) -> None:
        """Remember in `ctx` what a loaded state holds; called before anything else is asked after a load."""

    def needs_refresh(self, ctx: Context) -> bool:
        """Whether `refresh` is to be called before this step's `update`."""
        return False

    @property
    def takes_rows(self) -> bool:
        """Whether `grad.shape`, `dtype`, `device` and `grad[rows]` are all that is asked of the gradient of a matrix.

        It may then be a `numerics.row_gradients.RowGradient`, which makes rows anew each time they are asked for.
        An element rule gets slices of rows like any others, so only its `refresh` has to care.
        """
        return self.scope == "element" and type(self).refresh is Rule.refresh

    def begin_refresh_(self, state: State, ctx: Context) -> None:
        """What a refresh does to old state whatever the gradient is, in place; called just before `refresh`."""

    def refresh(self, grad: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        """Rare work on the whole gradient (a new basis, a statistic). Returns the slots that changed.

        Of several processes one may do it for all, so it changes nothing in place.
        """
        return {}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        """The direction, to be multiplied by the learning rate and subtracted, and the new state."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def refresh_is_due(self, ctx: Context) -> bool:
        """Whether this step is one at which `refresh` wants the whole gradient of the step."""
        return False

    def project(self, grad: Tensor, state: State) -> Tensor:
        """What `update` needs of the gradient: float32, linear in `grad`, so micro-batches may be added up."""
        raise NotImplementedError(f"{type(self).__name__} needs the whole gradient")

    def projected_numel(self, shape: Shape) -> int:
        """How many values `project` gives for a gradient of `shape`."""
        raise NotImplementedError(f"{type(self).__name__} needs the whole gradient")

    def update_projected(
        self, projected: Tensor, shape: Shape, state: State, ctx: Context
    ) -> tuple[Direction, dict[str, Tensor]]:
        """`update`, given `project(grad)` of a gradient of `shape`."""
        raise NotImplementedError(f"{type(self).__name__} needs the whole gradient")

    @property
    def accumulates_in(self) -> str | None:
        """The slot that is linear in the step's gradient, so that micro-batches may be added to it one by one."""
        return None

    def may_accumulate(self, state: Mapping[str, Tensor], ctx: Context) -> bool:
        """Whether this step needs nothing else of its whole gradient; the same for all its micro-batches."""
        return True

    def accumulate(self, grad: Tensor, state: State, ctx: Context, *, is_first: bool) -> dict[str, Tensor]:
        """The slot `accumulates_in` with a micro-batch's gradient in it; `is_first` of the step decays it before."""
        raise NotImplementedError(f"{type(self).__name__} needs the whole gradient of a step at once")

    def direction_of(self, accumulated: Tensor, state: State) -> Direction:
        """The direction, given the slot `accumulates_in` after the step's last micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} needs the whole gradient of a step at once")

    def change_basis(self, state: State, C: Tensor, ctx: Context) -> dict[str, Tensor]:
        """New state when the coordinates it lives in change by C (r, r); `ctx.step` updates were made."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot rotate its state; use on_refresh='keep' or 'reset'"
        )
