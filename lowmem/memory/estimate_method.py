"""What a way of training keeps through a whole step: weights, gradients and optimizer state, in bytes.

adamw_fused             weights and gradients in the model's dtype, two moments in it, a step count each
adamw_foreach           the same, and the root of the second moments of all weights at once in the update
adamw_fused_backward    as adamw_fused, each gradient freed as soon as its weight is updated
adamw_fp32_master       bfloat16 weights and gradients; float32 weights and moments, 12 bytes a value, and the
                        float32 copy of one gradient in the update
bitsandbytes_adamw8bit  the library by itself: all gradients, and the state of `adamw8bit`
lora_r16                frozen weights, float32 adapters of rank 16 on every linear layer, updated by adamw_fused
qlora_r16               the same; linear layers in nf4 with double quantisation, the rest in 16 bits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem.memory.activation_operators import Adapters
from lowmem.memory.adapter_formulas import adapted, adapters_of, lora_targets, nf4_bytes
from lowmem.memory.architecture import Architecture, Parameter
from lowmem.memory.arrivals import ADD, GO, STAY
from lowmem.memory.execution_formulas import NOTHING_LEFT, End, Pass, Update, Way, end_of, passes_of
from lowmem.memory.ledger import ALLOCATION_BYTES, rounded
from lowmem.memory.low_rank_formulas import projected
from lowmem.memory.row_gradient_formulas import row_update, takes_rows
from lowmem.memory.state_formulas import (
    BITSANDBYTES_TABLES_BYTES,
    Treatment,
    adamw8bit_state_bytes,
    state_bytes,
    treatments,
)
from lowmem.memory.step_formulas import accumulated, update_bytes
from lowmem.memory.turn_states import is_untouched
from lowmem.recipe.execution_choice import Mode, Situation, chosen_mode
from lowmem.recipe.schema import LoraRecipe, Recipe

BASELINES = (
    "adamw_fused",
    "adamw_foreach",
    "adamw_fused_backward",
    "adamw_fp32_master",
    "bitsandbytes_adamw8bit",
    "lora_r16",
    "qlora_r16",
)

ITEMSIZES = {"bfloat16": 2, "float32": 4}

LARGEST = ("embed_tokens", "lm_head")
"""Weights whose gradients may be made some rows at a time."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in nf4: its code, an 8-bit scale for each 64, a float32 scale for each 256 of those."""


@dataclass(frozen=True)
class Method:
    """Bytes, each tensor rounded up as the allocator does."""

    itemsize: int
    weights: int
    gradients: int
    """Of all trained parameters, when they are there together."""
    state: int
    parameters: int
    trained_parameters: int
    mode: Mode = "plain"
    passes: tuple[Pass, ...] = ()
    """The kinds of micro-batches of a step."""
    end: End = NOTHING_LEFT
    """Of the step, when all gradients are there or what is left of them."""
    adapters: Adapters | None = None
    by_rows: frozenset[str] = frozenset()
    """Weights whose gradients are made some rows at a time, by the names under which they arrive."""


def recipe_method(recipe: Recipe, shape: Architecture, *, on_cuda: bool) -> Method:
    """The recipe's own optimizer on what the recipe trains.

    Raises RefusedError for an execution that cannot do the clipping or the accumulation asked for.
    """
    method, trained = _frame(recipe, shape, base_is_4bit=recipe.model.weights == "nf4")
    itemsize = 4 if method.adapters is not None else method.itemsize
    treated = treatments(recipe.optimizer, trained)
    updates = _updates(treated, itemsize, clips=recipe.train.max_grad_norm is not None, on_cuda=on_cuda)
    way = _way(recipe, updates)
    whole = {each.name for each in updates if each.name in LARGEST and each.by_rows is None}
    by_rows = _by_rows(recipe, shape, way) - whole
    return replace(
        method,
        by_rows=by_rows,
        state=sum(each.state for each in updates),
        mode=way.mode,
        passes=_passes_in_turn(way, updates)
        if any(is_untouched(each.algorithm, each.settings) for each in treated) and way.mode != "fused"
        else passes_of(way, updates, by_rows=by_rows, most_due=_most_due(treated, updates)),
        end=end_of(way, updates),
    )


def _passes_in_turn(way: Way, updates: Sequence[Update]) -> tuple[Pass, ...]:
    """Where most weights have no gradient: a bound, as if all gradients that stay were there from the beginning.

    A layer's names are those of every layer, so it cannot be said of a gradient whether it is made. In backward each
    is there for a moment, and activations are those of a model that is trained as a whole.
    """
    state, gradients = sum(each.state for each in updates), sum(each.gradient for each in updates)
    return (Pass(GO, gradients, state),)


def _way(recipe: Recipe, updates: Sequence[Update]) -> Way:
    clip, clips = recipe.optimizer.clip, recipe.train.max_grad_norm is not None
    at = Situation(
        is_projected=any(each.projected for each in updates),
        micro_batches=recipe.train.gradient_accumulation_steps,
        clip=clip,
        clips=clips,
        accumulates=all(each.accumulated for each in updates),
    )
    return Way(
        mode=chosen_mode(recipe.train.execution, at),
        micro_batches=at.micro_batches,
        refreshes_first=recipe.optimizer.refresh_from == "first_micro_batch",
        projects_at_boundary=clips and clip != "full",
    )


def _by_rows(recipe: Recipe, shape: Architecture, way: Way) -> frozenset[str]:
    """Those of which every use can make its part of the gradient by rows."""
    is_exact = way.mode == "fused" and way.micro_batches == 1 and recipe.train.max_grad_norm is None
    if not is_exact or recipe.train.head_gradient == "whole" or recipe.lora is not None:
        return frozenset()
    if recipe.train.loss == "chunked":
        return frozenset({"embed_tokens", "lm_head"})
    return frozenset() if shape.is_tied else frozenset({"embed_tokens"})


def _updates(treated: Sequence[Treatment], itemsize: int, *, clips: bool, on_cuda: bool) -> list[Update]:
    alike: dict[object, Update] = {}
    updates = []
    for each in treated:
        name = _arrives_as(each.parameter)
        key = (name, id(each.settings), each.parameter.shape)
        if key not in alike:
            untouched = is_untouched(each.algorithm, each.settings)
            arguments = (each.algorithm, each.settings, each.parameter.shape, itemsize)
            alike[key] = Update(
                name=name,
                gradient=0 if untouched else rounded(each.parameter.numel * itemsize),
                state=state_bytes(*arguments, round_to=ALLOCATION_BYTES),
                temporary=0 if untouched else update_bytes(*arguments, on_cuda=on_cuda),
                projected=projected(*arguments, on_cuda=on_cuda),
                accumulated=None if clips else accumulated(*arguments),
                by_rows=row_update(*arguments, on_cuda=on_cuda)
                if name in LARGEST and takes_rows(*arguments[:3])
                else None,
            )
        updates.append(alike[key])
    return updates


def baseline_method(name: str, recipe: Recipe, shape: Architecture) -> Method:
    """One of BASELINES on the same work. A recipe with `lora` keeps its adapters under the adamw names."""
    if name not in BASELINES:
        raise ValueError(f"{name!r} is not a baseline; baselines are {', '.join(BASELINES)}")
    if name in ("lora_r16", "qlora_r16"):
        recipe = replace(recipe, lora=LoraRecipe(r=16))
    if name in ("qlora_r16", "adamw_fp32_master"):
        recipe = replace(recipe, model=replace(recipe.model, dtype="bfloat16"))
    is_4bit = name == "qlora_r16" or (recipe.model.weights == "nf4" and name != "lora_r16")
    method, trained = _frame(recipe, shape, base_is_4bit=is_4bit)
    itemsize = 4 if method.adapters is not None else method.itemsize
    counts = ALLOCATION_BYTES * len(trained)
    several = recipe.train.gradient_accumulation_steps > 1
    if name == "bitsandbytes_adamw8bit":
        state = sum(adamw8bit_state_bytes(each.numel, round_to=ALLOCATION_BYTES) for each in trained)
        return _plain(replace(method, state=state + BITSANDBYTES_TABLES_BYTES), several)
    if name == "adamw_fp32_master" and itemsize == 2:
        largest = max(each.numel for each in trained)
        method = replace(method, state=3 * _bytes(trained, 4) + counts)
        return _plain(method, several, update=rounded(4 * largest))
    method = replace(method, state=2 * method.gradients + counts)
    if name == "adamw_fused_backward":
        return replace(method, mode="fused", passes=(Pass(GO, 0, method.state),))
    return _plain(method, several, update=method.gradients if name == "adamw_foreach" else 0)


def _plain(method: Method, several_micro_batches: bool, update: int = 0) -> Method:
    """All gradients stay until the step, whose temporaries are `update` bytes."""
    passes = [Pass(STAY, 0, method.state)]
    if several_micro_batches:
        passes.append(Pass(ADD, method.gradients, method.state))
    return replace(method, passes=tuple(passes), end=End(method.gradients, update))


def trained_parameters(recipe: Recipe, shape: Architecture) -> Sequence[Parameter]:
    """The model's own, or its adapters."""
    return _frame(recipe, shape)[1]


def _frame(
    recipe: Recipe, shape: Architecture, *, base_is_4bit: bool = False
) -> tuple[Method, Sequence[Parameter]]:
    """Weights and gradients without an optimizer, and what is trained."""
    itemsize = ITEMSIZES[recipe.model.dtype]
    buffers = sum(rounded(4 * numel) for numel in shape.buffer_numels)
    frame = Method(itemsize, _bytes(shape.parameters, itemsize) + buffers, 0, 0, 0, 0)
    trained: Sequence[Parameter] = shape.parameters
    if recipe.lora is not None:
        targets = lora_targets(recipe.lora, shape)
        trained = [each for base in adapted(shape, targets) for each in adapters_of(base, recipe.lora.r)]
        weights = frame.weights + _bytes(trained, 4)
        if base_is_4bit:
            weights -= sum(
                rounded(each.numel * itemsize) - nf4_bytes(each.numel)
                for each in shape.parameters
                if each.is_linear
            )
        adapters = Adapters(
            recipe.lora.r, dropout=recipe.lora.dropout > 0, base_is_4bit=base_is_4bit, targets=targets
        )
        frame = replace(frame, weights=weights, adapters=adapters)
    trained_parameters = sum(each.numel for each in trained)
    frame = replace(
        frame,
        gradients=_bytes(trained, itemsize if recipe.lora is None else 4),
        parameters=shape.num_parameters + (0 if recipe.lora is None else trained_parameters),
        trained_parameters=trained_parameters,
    )
    return frame, trained


def _bytes(parameters: Sequence[Parameter], itemsize: int) -> int:
    return sum(rounded(each.numel * itemsize) for each in parameters)


def _arrives_as(parameter: Parameter) -> str:
    """The name under which the decoder's formulas use it: q_proj, q_proj.bias, q_proj.lora_A, norm, lm_head."""
    *path, module, kind = parameter.name.split(".")
    if module.startswith("lora_"):
        return f"{path[-1]}.{module}"
    if "norm" in module:
        return "norm"
    return module if kind == "weight" else f"{module}.{kind}"


def _most_due(treated: Sequence[Treatment], updates: Sequence[Update]) -> int:
    """Bytes by which whole gradients exceed projected ones, of the matrices that are refreshed in one step."""
    due: dict[int, Counter[int]] = {}
    sizes = Counter(id(each.settings) for each in treated)
    seen: Counter[int] = Counter()
    for each, update in zip(treated, updates, strict=True):
        group = id(each.settings)
        if update.projected is not None:
            gap = each.settings["refresh_every"] if each.settings["stagger"] else 0
            offset = seen[group] * gap // sizes[group]
            due.setdefault(group, Counter())[offset] += update.gradient - update.accumulator
        seen[group] += 1
    return sum(max(by_offset.values()) for by_offset in due.values())
