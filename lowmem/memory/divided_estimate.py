"""The memory of the fullest of W processes that train together, by formula. Imports no torch.

Weights, gradients and state are exact (`divided_tensors`, `divided_state`): the tests count those of real processes. So
is what is sent for matrices that come together (`divided_exchange`). What a strategy holds beside them is a bound, from
reading its code (`divided_buffers`). Activations are those of one device on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem.errors import RefusedError
from lowmem.memory.activation_profile import profile
from lowmem.memory.architecture import Architecture
from lowmem.memory.arrivals import ADD, GO, STAY, Arrivals
from lowmem.memory.cards import CUBLAS_BYTES
from lowmem.memory.divided_buffers import buffers, reduced_by_ddp, tail_numel
from lowmem.memory.divided_exchange import exchange_bytes, sent_bytes
from lowmem.memory.divided_pieces import DIVIDING, Shown, Strategy, divided
from lowmem.memory.divided_state import divided_state_bytes, itemsize_of_stepped
from lowmem.memory.divided_tensors import Setting, divided_tensors
from lowmem.memory.divided_traffic import strategy_sent_values
from lowmem.memory.estimate import Estimate, conditions_of, estimate, reserved_for, work_of
from lowmem.memory.estimate_method import recipe_method, trained_parameters
from lowmem.memory.ledger import ALLOCATION_BYTES, PARTS, Part, Phase, rounded
from lowmem.memory.low_rank_formulas import projected
from lowmem.memory.plan_document import Held
from lowmem.memory.state_formulas import Treatment, all_treatments
from lowmem.recipe.schema import Recipe

Line = tuple[str, Part, Sequence[int] | int]
"""What is alive, which part that is, and its bytes: of each process, or the same in all of them."""


@dataclass(frozen=True)
class DividedEstimate:
    """The fullest process at its fullest moment, and what all of them have and send. Bytes."""

    fullest: Estimate
    held: list[Held]
    """What is alive then."""
    state: list[int]
    """Of each process."""
    matrices: list[int]
    """How many each process updates for all; none where every process updates all."""
    by_rows: int
    """How many are updated by the rows that each process has."""
    sent: list[int]
    """By each process in a step without a refresh, so that matrices are updated."""
    strategy_sent: int
    """By each process in a step, for the strategy itself."""


def divided_estimate(
    recipe: Recipe,
    architecture: Architecture,
    strategy: Strategy,
    processes: int,
    *,
    masked: bool = True,
    on_cuda: bool = True,
) -> DividedEstimate:
    """One training step of `recipe`, of which every process takes rows of its own.

    Raises RecipeError for a target that matches nothing, RefusedError for adapters where a model is divided.
    """
    make = _divided if strategy in DIVIDING else _whole
    return make(recipe, architecture, strategy, processes, masked, on_cuda)


def _whole(
    recipe: Recipe, shape: Architecture, strategy: Strategy, processes: int, masked: bool, on_cuda: bool
) -> DividedEstimate:
    """Of a model that every process has: what one device needs, and the reducer's buckets."""
    alone = estimate(recipe, shape, masked=masked, on_cuda=on_cuda)
    trained = trained_parameters(recipe, shape)
    itemsize = 4 if recipe.lora is not None or recipe.model.dtype == "float32" else 2
    treated = all_treatments(recipe.optimizer, trained)
    mode = alone.conditions["execution"]
    leaving = [each.parameter for each in treated if _leaves_reducer(each, mode, itemsize, on_cuda)]
    buckets = rounded(reduced_by_ddp(trained, leaving, itemsize)) if processes > 1 else 0
    parts = {**alone.parts, "other": alone.parts["other"] + buckets}
    peak = alone.peak_bytes + buckets
    reduced = sum(_reduced_bytes(each, mode, itemsize, on_cuda) for each in treated)
    sent = strategy_sent_values(strategy, reduced, processes, recipe.train.gradient_accumulation_steps)
    held = [Held("buckets of gradients that are reduced", "other", 1, buckets)] if buckets else []
    return DividedEstimate(
        replace(alone, peak_bytes=peak, reserved_bytes=reserved_for(peak), parts=parts),
        [
            *held,
            *(Held("all of one device", part, 1, nbytes) for part, nbytes in alone.parts.items() if nbytes),
        ],
        [recipe_method(recipe, shape, on_cuda=on_cuda).state] * processes,
        [0] * processes,
        0,
        [0] * processes,
        sent,
    )


def _leaves_reducer(each: Treatment, mode: str, itemsize: int, on_cuda: bool) -> bool:
    """Whether its gradient is reduced by who uses it, and not by DDP."""
    if each.algorithm == "block_adam" or mode == "fused":
        return True
    low = projected(each.algorithm, each.settings, each.parameter.shape, itemsize, on_cuda=on_cuda)
    return mode == "project" and low is not None


def _reduced_bytes(each: Treatment, mode: str, itemsize: int, on_cuda: bool) -> int:
    """Of what is averaged for a parameter in a step without a refresh: its gradient, or what that is projected to."""
    shape = each.parameter.shape
    low = projected(each.algorithm, each.settings, shape, itemsize, on_cuda=on_cuda)
    return low.accumulator if low is not None and mode == "project" else itemsize * each.parameter.numel


def _divided(
    recipe: Recipe, shape: Architecture, strategy: Strategy, processes: int, masked: bool, on_cuda: bool
) -> DividedEstimate:
    if recipe.lora is not None:
        raise RefusedError(
            f"lora: adapters have no memory formula under {strategy}, which keeps them in other dtypes. Plan them "
            "under ddp (--strategy ddp), or on one device (without --world)."
        )
    recipe = replace(recipe, train=replace(recipe.train, execution="plain"))
    method = recipe_method(recipe, shape, on_cuda=on_cuda)
    micro_batches = recipe.train.gradient_accumulation_steps
    shown = divided(all_treatments(recipe.optimizer, shape.parameters), strategy, processes)
    at = Setting(processes, method.itemsize, micro_batches, ALLOCATION_BYTES)
    tensors, beside = (
        divided_tensors(shown, shape.parameters, strategy, at),
        buffers(strategy, shape, method.itemsize),
    )
    stepped = itemsize_of_stepped(strategy, method.itemsize)
    state = divided_state_bytes(shown, processes, stepped, round_to=ALLOCATION_BYTES)

    work = work_of(method, recipe, shape, sequence_length=None, masked=masked, on_cuda=on_cuda)
    rotary = sum(rounded(4 * numel) for numel in shape.buffer_numels)
    batches = micro_batches * 3 * 8 * work.rows * work.tokens
    always: list[Line] = [
        ("weights", "weights", tensors.weights),
        ("rotary frequencies", "weights", rotary),
        ("optimizer state", "optimizer_state", state),
        ("batches and cuBLAS's workspace", "other", batches + (CUBLAS_BYTES if on_cuda else 0)),
    ]
    passing = profile(shape, work, _arrivals(strategy, micro_batches))
    moments: list[tuple[Phase, list[Line]]] = [
        (
            passing.phase,
            [
                *always,
                ("gradients", "gradients", _before(tensors.gradients_in_backward, strategy, micro_batches)),
                *_temporary(beside.in_backward),
                *(("one micro-batch", part, nbytes) for part, nbytes in passing.parts.items()),
            ],
        ),
        (
            "optimizer",
            [
                *always,
                ("gradients", "gradients", tensors.gradients),
                *_temporary(beside.in_step),
                (
                    "matrices that come together, or an update",
                    "temporary",
                    exchange_bytes(shown, processes, stepped, on_cuda=on_cuda),
                ),
            ],
        ),
    ]
    if beside.in_reduction:
        gradients: Line = ("gradients", "gradients", tensors.gradients_in_backward)
        moments.append(("backward", [*always, gradients, *_temporary(beside.in_reduction)]))
    phase, held = _fullest(moments, processes)
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for each in held:
        parts[each.part] += each.nbytes
    peak = sum(parts.values())
    numel, tail = shape.num_parameters, tail_numel(shape)
    return DividedEstimate(
        Estimate(peak, reserved_for(peak), parts, phase, conditions_of(method, recipe, shape, work)),
        held,
        state,
        _owned(shown, processes),
        sum(each.on_rows is not None for group in shown for each in group),
        sent_bytes(shown, processes, stepped),
        method.itemsize * strategy_sent_values(strategy, numel, processes, micro_batches, tail=tail),
    )


def _arrivals(strategy: Strategy, micro_batches: int) -> Arrivals:
    """What becomes of a gradient that a micro-batch has completed: divided at once, or only after the last one."""
    if strategy == "zero1":
        return ADD if micro_batches > 1 else STAY
    return GO


def _before(gradients: Sequence[int], strategy: Strategy, micro_batches: int) -> Sequence[int]:
    """Those that are there from the beginning of a backward pass, at most."""
    return [0] * len(gradients) if strategy == "zero1" and micro_batches == 1 else gradients


def _temporary(items: dict[str, int]) -> list[Line]:
    return [(name, "temporary", nbytes) for name, nbytes in items.items()]


def _fullest(moments: Sequence[tuple[Phase, list[Line]]], processes: int) -> tuple[Phase, list[Held]]:
    """Of all moments in all processes: of equals the first process'."""
    fullest: tuple[int, int, int] = (-1, 0, 0)
    for number, (_, lines) in enumerate(moments):
        alike = sum(nbytes for _, _, nbytes in lines if isinstance(nbytes, int))
        own = [nbytes for _, _, nbytes in lines if not isinstance(nbytes, int)]
        totals = [sum(each) for each in zip(*own, strict=True)] if own else [0] * processes
        most = max(totals)
        if alike + most > fullest[0]:
            fullest = (alike + most, number, totals.index(most))
    _, number, rank = fullest
    phase, lines = moments[number]
    held = [
        Held(what, part, 1, nbytes if isinstance(nbytes, int) else nbytes[rank])
        for what, part, nbytes in lines
    ]
    return phase, sorted((each for each in held if each.nbytes), key=lambda each: -each.nbytes)


def _owned(shown: Sequence[Shown], processes: int) -> list[int]:
    count = [0] * processes
    for group in shown:
        for each in group:
            if each.owner is not None:
                count[each.owner] += 1
    return count
