"""The engine on pieces: element rules step the piece that a process has, matrix rules its rows or, at an owner, all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem.numerics.row_share import ALL_ROWS
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.optimizer_state import STEPS
from lowmem.optim.rule import Context, Rule
from lowmem.run.layouts.by_rows import (
    DividedRows,
    Way,
    described_ways,
    refreshes_together,
    rows_at,
    way_of,
)
from lowmem.run.layouts.exchange import Exchange, batches_of, device_to_talk_on
from lowmem.run.layouts.pieces import Layout, Piece, owners_of, refuse_gaps


class PieceOptimizer(LowMemOptimizer):
    """Makes the steps of another optimizer whose parameters are in pieces, and holds this process' part of its state.

    A rule that treats every value by itself runs on the piece, and so has the piece's state. So does a rule for
    matrices on rows that need little of each other, a few numbers of which are added up (see `by_rows`). Any other
    runs at the matrix' owner: gradient and weight come together there, `step_param` does what it does on one process,
    and the new weight goes back. Its state is the owner's alone. So every rule is exact, in any dtype and with any
    rounding, and state is divided by the number of processes.

    Sent in a step by each process are, of every matrix that is split and has an owner, the gradient, the weight and
    the new weight, less what its owner has of it: 3 m n (W - 1) / W^2 values on average when W processes hold equal
    parts. To add up k values, in a ring, each process sends 2 k (W - 1) / W.
    """

    algorithm = "adamw"  # of no parameter: each group has its own

    def __init__(
        self,
        settings_of_groups: Sequence[Mapping[str, Any]],
        tensors_of_groups: Sequence[Sequence[Tensor]],
        layout: Layout,
        group: dist.ProcessGroup | None = None,
    ):
        """settings_of_groups: the other optimizer's groups; tensors_of_groups: what these will hold in a step."""
        self.layout, self._process_group = layout, group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self._pieces: dict[Tensor, Piece] = {}
        self._owner: dict[Tensor, int] = {}
        self._stands_for: dict[int, list[Tensor]] = {}
        """By the tensor in the outer optimizer's groups."""
        self._idle: dict[Tensor, Tensor] = {}
        self._ways: dict[Tensor, Way] = {}
        """Of each parameter whose rule is one for matrices."""
        self._shares: dict[Tensor, DividedRows] = {}
        """Of those that are updated by rows, and of pieces whose rules add up sums of a gradient."""
        self.sent = 0
        """Values that this process has sent so far to owners and back."""
        self._number_of = {
            id(tensor): number for number, tensors in enumerate(tensors_of_groups) for tensor in tensors
        }
        self._waiting = [{id(tensor) for tensor in tensors} for tensors in tensors_of_groups]
        """Of each group, what has not been stepped yet in the step under way."""
        pairs = zip(settings_of_groups, tensors_of_groups, strict=True)
        super().__init__([self._mirrored(settings, tensors) for settings, tensors in pairs], {})
        self._choose_ways()
        self._give_owners()

    @property
    def summed(self) -> int:
        """Values that were added up over all processes so far, in updates by rows."""
        return sum(each.summed for param, each in self._shares.items() if self.is_by_rows(param))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Settings were checked where the parameters were whole."""
        torch.optim.Optimizer.add_param_group(self, param_group)

    def _mirrored(self, settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The group with what stands here for each parameter, in the same places."""
        params = []
        for given in tensors:
            made = [self._made(piece) for piece in self.layout.pieces_of(given)]
            self._stands_for[id(given)] = made
            params += made
        own = {name: value for name, value in settings.items() if name not in ("params", "param_names")}
        return {**own, "params": params, "param_names": [self._pieces[param].name for param in params]}

    def _made(self, piece: Piece) -> Tensor:
        refuse_gaps(piece)
        param = nn.Parameter(piece.weight(), requires_grad=True)
        self._pieces[param] = piece
        return param

    def _choose_ways(self) -> None:
        """Matrices that are updated by rows stand here as these rows."""
        for settings in self.param_groups:
            for param in settings["params"]:
                rule = self.rule_of(param, settings)
                if rule.scope == "matrix":
                    self._ways[param] = way_of(self._pieces[param], rule)
                elif rule.sums_in_refresh:
                    self._shares[param] = DividedRows(self._pieces[param].numel, self._process_group)
        for param, way in self._ways.items():
            if way.on_rows is not None:
                piece = self._pieces[param]
                self._shares[param] = DividedRows(piece.shape[0], self._process_group)
                param.data = piece.weight().view(rows_at(piece, self.rank))

    def _give_owners(self) -> None:
        """Between steps a matrix stands here as a tensor of its shape without memory, and where it is not owned as an
        empty one."""
        for settings in self.param_groups:
            matrices = [param for param in settings["params"] if self._needs_whole(param)]
            owners = owners_of([self._pieces[param] for param in matrices], self.processes)
            for param, owner in zip(matrices, owners, strict=True):
                shape = self._pieces[param].shape if owner == self.rank else (0,)
                self._owner[param] = owner
                self._idle[param] = param.data.new_zeros(()).expand(shape)
                param.data = self._idle[param]

    def owns(self, param: Tensor) -> bool:
        """Whether this process steps all of it."""
        return self._owner.get(param) == self.rank

    def piece_of(self, param: Tensor) -> Piece:
        return self._pieces[param]

    def described_ways(self) -> list[str]:
        """How many matrices are updated which way, and why, a line each."""
        return described_ways(self._ways.values())

    def by_rows(self) -> list[str]:
        """Names of the matrices that are updated by rows."""
        return sorted(self._pieces[param].name for param in self._ways if self.is_by_rows(param))

    def all_pieces(self) -> list[Piece]:
        """In the order of the groups."""
        return [self._pieces[param] for group in self.param_groups for param in group["params"]]

    # ---------------------------------------------------------------- what the engine asks

    def _whole_shape(self, param: Tensor) -> tuple[int, ...]:
        """That of the whole parameter: of a piece nobody could tell whether it is a matrix."""
        return self._pieces[param].shape

    def _rounding(
        self, param: Tensor, group: dict[str, Any], ctx: Context, purpose: str
    ) -> torch.Generator | None:
        """Every piece has noise of its own."""
        if param in self._owner:
            return super()._rounding(param, group, ctx, purpose)
        start = self._pieces[param].ranges[self.rank][0]
        return super()._rounding(param, group, ctx, f"{purpose} from {start}")

    def _needs_whole(self, param: Tensor) -> bool:
        return param in self._ways and param not in self._shares

    def is_by_rows(self, param: Tensor) -> bool:
        """Whether it is a matrix of which each process updates its rows."""
        return param in self._ways and param in self._shares

    def whole_rule_of(self, param: Tensor, group: dict[str, Any]) -> Rule:
        """That of the parameter, were it whole."""
        return super().rule_of(param, group)

    def rule_of(self, param: Tensor, group: dict[str, Any]) -> Rule:
        rule = self.whole_rule_of(param, group)
        if not self.is_by_rows(param):
            return rule
        found = rule.on_rows(self._pieces[param].shape)
        assert found is not None
        return found.rule

    def _context(self, param: Tensor, group: dict[str, Any], step: int) -> Context:
        ctx = super()._context(param, group, step)
        ctx.share = self._shares.get(param, ALL_ROWS)
        return ctx

    # ---------------------------------------------------------------- a step

    @torch.no_grad()
    def step_for(self, outer: LowMemOptimizer) -> None:
        """A step of the tensors that the outer optimizer's groups hold now, with the settings that they have now.

        DeepSpeed shows a group, or a part of one, at a time: a group's step is counted when all of it had its turn.
        """
        for settings in outer.param_groups:
            if not settings["params"]:
                continue
            number = self._number_of[id(settings["params"][0])]
            own = self.param_groups[number]
            settings.update(
                {STEPS: own[STEPS]} if STEPS in own else {}
            )  # after a load they are known here alone
            params = [param for given in settings["params"] for param in self._stands_for[id(given)]]
            self._step_those(self._with_gradients(params), settings)
            self._waiting[number] -= {id(given) for given in settings["params"]}
            if not self._waiting[number]:
                self._waiting[number] = {each for each, group in self._number_of.items() if group == number}
                self._count_step_of_turn(settings, own["params"])
                own.update({STEPS: settings[STEPS]} if STEPS in settings else {})

    def _step_those(self, params: list[Tensor], settings: dict[str, Any]) -> None:
        """Matrices that travel go first: whoever updates some of its own before would let all others wait."""
        whole = [param for param in params if param in self._owner]
        self._step_pieces([param for param in params if param not in self._owner], settings)
        split = [param for param in whole if len(self._pieces[param].holders) > 1]
        owners = [self._owner[param] for param in split]
        for batch in batches_of([self._pieces[param] for param in split], owners):
            self._step_whole(split[batch], settings)
        for param in whole:
            if len(self._pieces[param].holders) < 2:
                self._step_whole([param], settings)

    def _with_gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Those of which any process has a gradient; all processes must do the same with each of them."""
        if self.layout.always_has_gradients or not params:
            return params
        has = [self._pieces[param].grad() is not None for param in params]
        found = self._anywhere(has, params[0].device)
        return [param for param, here in zip(params, found, strict=True) if here]

    def _anywhere(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Of each flag, whether it is set on any process."""
        talks_on = device_to_talk_on(device, self._process_group)
        numbers = torch.tensor(flags, dtype=torch.uint8, device=talks_on)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._process_group)
        return [bool(number) for number in numbers.tolist()]

    def _step_pieces(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            piece = self._pieces[param]
            shape = rows_at(piece, self.rank) if self.is_by_rows(param) else (piece.numel_at(self.rank),)
            param.data = piece.weight().view(shape)
            grad = piece.grad()
            param.grad = torch.zeros_like(param.data) if grad is None else grad.to(param.dtype).view(shape)
        self._refresh_from_whole_gradients(params, group)
        for param in params:
            self.step_param(param, group)
            param.grad = None

    def _refresh_from_whole_gradients(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        """What a rule on pieces asks of the whole gradient now and then, every process finds out by itself.

        Of sums of it, those who have no values of a parameter give zeros.
        """
        may = [param for param in params if refreshes_together(self.rule_of(param, group))]
        if not may:
            return
        wants = [
            bool(param.numel())
            and self.rule_of(param, group).needs_refresh(self.coming_context(param, group))
            for param in may
        ]
        for param, wanted in zip(may, self._anywhere(wants, may[0].device), strict=True):
            if not wanted:
                continue
            piece = self._pieces[param]
            if count := self.rule_of(param, group).sums_in_refresh:
                if param.numel():
                    self.refresh_basis_(param, group)
                else:
                    self._shares[param].sum_(torch.zeros(count, dtype=torch.float64, device=param.device))
                continue
            talks_on = device_to_talk_on(param.device, self._process_group)
            whole = param.new_zeros(piece.numel, device=talks_on)
            start, stop = piece.ranges[self.rank]
            assert param.grad is not None
            whole[start:stop] = param.grad.view(-1)
            dist.all_reduce(whole, group=self._process_group)
            if param.numel():
                self.refresh_basis_(param, group, grad=whole.to(param.device).view(piece.shape))

    def _step_whole(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        pieces = [self._pieces[param] for param in params]
        exchange = Exchange(pieces, [self._owner[param] for param in params], self._process_group)
        held = [piece.weight() for piece in pieces]
        grads = exchange.to_owners(
            [
                torch.zeros_like(weight) if (grad := piece.grad()) is None else grad.to(weight.dtype)
                for piece, weight in zip(pieces, held, strict=True)
            ]
        )
        weights = exchange.to_owners(held)
        for param, piece, weight, grad in zip(params, pieces, weights, grads, strict=True):
            if weight is not None and grad is not None:
                param.data, param.grad = weight.view(piece.shape), grad.view(piece.shape)
                self.step_param(param, group)
                param.data, param.grad = self._idle[param], None
        exchange.from_owners(weights, held)
        self.sent += exchange.sent
