"""What a step's micro-batches and its end take of gradients and temporaries, for each way to execute it.

    plain     every gradient stays; with clipping by what the rules use, matrices are projected at the boundary
    project   a matrix keeps its projected gradient, the others their whole ones; a matrix whose basis is to be
              fitted to the gradient of the whole step keeps that until the last micro-batch
    fused     each gradient is used and freed as it arrives; of several micro-batches, in the last one, or added to
              the momentum in each

Any matrix may be refreshed in any step, so each pass assumes that the one under way is. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lowmem.memory.arrivals import ADD, STAY, Arrival, Arrivals
from lowmem.memory.low_rank_formulas import Projected
from lowmem.memory.row_gradient_formulas import RowUpdate
from lowmem.memory.step_formulas import Accumulated
from lowmem.recipe.execution_choice import Mode


@dataclass(frozen=True)
class Pass:
    """One kind of micro-batch: what was there before, in bytes, and what becomes of its gradients."""

    arrivals: Arrivals
    gradients: int
    state: int


@dataclass(frozen=True)
class End:
    """The fullest moment after the last backward pass, in bytes."""

    gradients: int
    temporary: int


NOTHING_LEFT = End(0, 0)


@dataclass(frozen=True)
class Update:
    """One parameter's, in bytes."""

    name: str
    """Under which its gradient arrives."""
    gradient: int
    state: int
    temporary: int
    """Of an update from the whole gradient, a refresh included."""
    projected: Projected | None = None
    """None where its rule wants the whole gradient."""
    accumulated: Accumulated | None = None
    """None where micro-batches are not added to its state."""
    by_rows: RowUpdate | None = None
    """None where its gradient is whole."""
    made: int = 0
    """Of its state, what is made in its update."""

    @property
    def accumulator(self) -> int:
        """What is kept of it in project."""
        return self.gradient if self.projected is None else self.projected.accumulator


@dataclass(frozen=True)
class Way:
    """How a step is made, as the recipe says it."""

    mode: Mode
    micro_batches: int
    refreshes_first: bool
    """Whether a basis that is due comes from the first micro-batch, and not from the whole step."""
    projects_at_boundary: bool
    """Whether a norm is taken there of what the rules use."""


def passes_of(
    way: Way, updates: Sequence[Update], *, most_due: int, by_rows: frozenset[str] = frozenset()
) -> tuple[Pass, ...]:
    """All kinds of micro-batches.

    most_due: bytes that matrices due in one step keep beyond project's. by_rows: names of weights whose gradients
    are made some rows at a time.
    """
    state, whole = sum(each.state for each in updates), sum(each.gradient for each in updates)
    if way.mode == "project":
        return _project_passes(way, updates, state, most_due)
    if way.micro_batches == 1:
        updates = [replace(each, by_rows=each.by_rows if each.name in by_rows else None) for each in updates]
        return (Pass(STAY if way.mode == "plain" else _named(updates, _used_by_rows), 0, state),)
    if way.mode == "plain":
        passes = [Pass(STAY, 0, state), Pass(ADD, whole, state)]
    else:
        passes = _fused_passes(way, updates, state)
    if any(each.projected for each in updates):
        passes.append(_first_with_refresh(way, updates, state, _refreshed))
    return tuple(passes)


def _fused_passes(way: Way, updates: Sequence[Update], state: int) -> list[Pass]:
    held = sum(each.gradient for each in updates if each.accumulated is None)
    passes = [Pass(_named(updates, _first_of_several), 0, state)]
    if way.micro_batches > 2:
        passes.append(Pass(_named(updates, _middle_of_several), held, state))
    passes.append(Pass(_named(updates, _last_of_several), held, state))
    if any(each.accumulated and each.accumulated.waits_first for each in updates):
        passes += _fused_passes(way, [_in_its_first_step(each) for each in updates], 0)
    return passes


def _in_its_first_step(each: Update) -> Update:
    """Gradients wait for their sum, and in the last micro-batch the state takes their place."""
    return replace(each, accumulated=None, made=each.state)


def _project_passes(way: Way, updates: Sequence[Update], state: int, most_due: int) -> tuple[Pass, ...]:
    if way.micro_batches == 1:
        return (Pass(_named(updates, _kept), 0, state),)
    held = sum(each.accumulator for each in updates)
    if way.refreshes_first:
        most_due = 0
    return (
        _first_with_refresh(way, updates, state, _kept),
        Pass(_named(updates, lambda each: _kept(each, refresh=False)), 0, state),
        Pass(
            _named(updates, lambda each: _added(each, refresh=not way.refreshes_first)),
            held + most_due,
            state,
        ),
    )


def _first_with_refresh(
    way: Way, updates: Sequence[Update], state: int, arrival: Callable[[Update], Arrival]
) -> Pass:
    """The first micro-batch of a step whose bases come from it: any step, or only the one that makes the state."""
    if way.refreshes_first:
        return Pass(_named(updates, arrival), 0, state)

    def with_state(each: Update) -> Arrival:
        return replace(arrival(each), state=each.state if each.projected else 0)

    return Pass(_named(updates, with_state), 0, 0)


def _used_by_rows(each: Update) -> Arrival:
    if each.by_rows is None:
        return _used(each)
    return Arrival(beside=each.by_rows.beside, left=each.by_rows.left)


def _used(each: Update) -> Arrival:
    """Of a gradient that is whole."""
    if each.projected is None:
        return Arrival(beside=each.temporary)
    projecting = max(each.projected.refresh, each.projected.project)
    return Arrival(beside=projecting, after=each.projected.wide + each.projected.update_wide)


def _first_of_several(each: Update) -> Arrival:
    return Arrival(stays=True) if each.accumulated is None else Arrival(beside=each.accumulated.add)


def _middle_of_several(each: Update) -> Arrival:
    return (
        Arrival(adds=True, stays=True) if each.accumulated is None else Arrival(beside=each.accumulated.add)
    )


def _last_of_several(each: Update) -> Arrival:
    if each.accumulated is None:
        return replace(_used(each), adds=True, state=each.made)
    return Arrival(beside=each.accumulated.finish)


def _refreshed(each: Update) -> Arrival:
    return Arrival(beside=each.projected.refresh if each.projected else 0, stays=True)


def _kept(each: Update, *, refresh: bool = True) -> Arrival:
    if each.projected is None:
        return Arrival(stays=True)
    beside = max(each.projected.project, each.projected.refresh if refresh else 0)
    return Arrival(beside=beside, projected=each.projected.accumulator)


def _added(each: Update, *, refresh: bool) -> Arrival:
    if each.projected is None:
        return Arrival(adds=True, stays=True)
    # A matrix that is refreshed has its earlier gradient, to which this one is added first.
    refreshing = each.projected.refresh - each.gradient if refresh else 0
    return Arrival(beside=max(each.projected.project, refreshing))


def _named(updates: Sequence[Update], arrival: Callable[[Update], Arrival]) -> Arrivals:
    """By name; where a target takes some layers only, what takes more stands for all."""
    found: dict[str, Arrival] = {}
    seen: set[tuple[str, int, int]] = set()
    for each in updates:
        key = (each.name, each.temporary, each.accumulator)
        if key not in seen:
            seen.add(key)
            candidates = [arrival(each), *([found[each.name]] if each.name in found else [])]
            found[each.name] = max(
                candidates, key=lambda one: (one.stays, one.projected, one.beside + one.after)
            )
    return Arrivals(Arrival(), tuple(found.items()))


def end_of(way: Way, updates: Sequence[Update]) -> End:
    """The fullest moment from the boundary to the last update, which go through the parameters in order."""
    if way.mode == "fused":
        return NOTHING_LEFT
    if way.mode == "project":
        return _fullest(
            (each.accumulator, each.projected.update, -each.accumulator)
            if each.projected
            else (each.gradient, each.temporary, 0)
            for each in updates
        )
    if not way.projects_at_boundary or not any(each.projected for each in updates):
        return _fullest((each.gradient, each.temporary, 0) for each in updates)
    projecting = _fullest(
        (
            each.gradient,
            max(each.projected.project, each.projected.refresh),
            each.projected.wide - each.gradient,
        )
        if each.projected
        else (each.gradient, 0, 0)
        for each in updates
    )
    updating = _fullest(
        (each.projected.wide, each.projected.update_wide, -each.projected.wide)
        if each.projected
        else (each.gradient, each.temporary, 0)
        for each in updates
    )
    return max(projecting, updating, key=lambda end: end.gradients + end.temporary)


def _fullest(turns: Iterable[tuple[int, int, int]]) -> End:
    """Of turns that each find a gradient, take temporaries, and change how many bytes of gradients there are."""
    turns = list(turns)
    gradients = sum(held for held, _, _ in turns)
    fullest = End(gradients, 0)
    for _, temporary, change in turns:
        if gradients + temporary > fullest.gradients + fullest.temporary:
            fullest = End(gradients, temporary)
        gradients += change
    return fullest
