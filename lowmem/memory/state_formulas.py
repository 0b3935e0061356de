"""Optimizer state of one parameter, from the optimizer's name, its settings and a shape. Imports no torch.

    optimizer   state of a parameter of N values, (m, n) with m <= n where it is a matrix
    adamw       exp_avg N, exp_avg_sq N
    sgd         momentum_buffer N; nothing without momentum
    sgd_sai     momentum_buffer N (nothing without momentum), gsnr 1 in float32
    adafactor   exp_avg_sq_row and exp_avg_sq_col, m + n in float32, or exp_avg_sq N in float32 for what is no matrix;
                exp_avg N with beta1
    sinkgd      nothing; momentum_buffer N with momentum; as adamw for what is no matrix; muon likewise
    swan        nothing; as adamw for what is no matrix
    block_adam  as adamw for the blocks whose turn it is, nothing for the others
    frugal      see `frugal_states`
    adamw8bit, lion8bit    see `coded_states`
    low rank    see `low_rank_states`

and `step`, 4 bytes. A value takes the bytes of its role's storage format:

    param, fp32, bf16   its dtype's
    int8                1, and 4 for each 256 values, bitsandbytes' codes likewise
    int4                1 for two, and 3 for each 128 values

The tests hold every optimizer equal to `LowMemOptimizer.state_bytes()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.claims import claimed
from lowmem.errors import RecipeError
from lowmem.memory.architecture import Parameter, Shape
from lowmem.memory.coded_states import adamw8bit_state, lion8bit_state
from lowmem.memory.frugal_states import frugal_state
from lowmem.memory.ledger import rounded
from lowmem.memory.low_rank_states import LOW_RANK_STATES
from lowmem.memory.state_tensors import Settings, State, StateTensor, adamw_state, is_matrix
from lowmem.memory.turn_states import is_untouched, resting_in_the_fullest_turn
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import OptimizerRecipe

STEP_BYTES = 4


def _sgd(settings: Settings, shape: Shape) -> State:
    return {"momentum_buffer": StateTensor(math.prod(shape))} if settings.get("momentum") else {}


def _sgd_sai(settings: Settings, shape: Shape) -> State:
    return {**_sgd(settings, shape), "gsnr": StateTensor(1, "scalar")}


def _adafactor(settings: Settings, shape: Shape) -> State:
    moment = {"exp_avg": StateTensor(math.prod(shape))} if settings["beta1"] else {}
    if not is_matrix(shape):
        return {"exp_avg_sq": StateTensor(math.prod(shape), "factor"), **moment}
    *batch, rows, columns = shape
    return {
        "exp_avg_sq_row": StateTensor(math.prod(batch) * rows, "factor"),
        "exp_avg_sq_col": StateTensor(math.prod(batch) * columns, "factor"),
        **moment,
    }


def _normalised(settings: Settings, shape: Shape) -> State:
    return _sgd(settings, shape) if is_matrix(shape) else adamw_state(settings, shape)


def _block_adam(settings: Settings, shape: Shape) -> State:
    return {} if settings.get("rests") else adamw_state(settings, shape)


FORMULAS: dict[str, Callable[[Settings, Shape], State]] = {
    "adamw": adamw_state,
    "sgd": _sgd,
    "sgd_sai": _sgd_sai,
    "adafactor": _adafactor,
    "sinkgd": _normalised,
    "swan": _normalised,
    "muon": _normalised,
    **LOW_RANK_STATES,
    "frugal": frugal_state,
    "block_adam": _block_adam,
    "adamw8bit": adamw8bit_state,
    "lion8bit": lion8bit_state,
}
"""A new optimizer is one function, and a name below if it treats matrices only."""

TREATS_MATRICES = frozenset({*LOW_RANK_STATES, "sinkgd", "swan", "muon", "frugal"})
"""Optimizers that leave all but the targeted matrices to the fallback."""

_FORMAT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 1}
_FIXED_FORMATS = {"factor": "fp32", "scalar": "fp32", "codes": "int8"}

INT8_BLOCK, INT4_GROUP = 256, 128
"""Values that share a scale, as in `lowmem.numerics`; a test holds them equal."""


def with_defaults(algorithm: str, settings: Settings) -> dict[str, Any]:
    """The settings with those that were left out."""
    table = optimizer_table()[algorithm]["settings"]
    filled = {**{name: entry["default"] for name, entry in table.items()}, **settings}
    if (storage := table.get("storage")) and storage["default"]:
        filled["storage"] = {**storage["default"], **(filled["storage"] or {})}
    return filled


def state_values(algorithm: str, settings: Settings, shape: Shape) -> State:
    """The tensors of state of a parameter of `shape`, by name, without `step`. Defaults are filled in.

    Raises NotImplementedError for an optimizer without a formula; a test keeps that from happening.
    """
    if algorithm not in FORMULAS:
        raise NotImplementedError(
            f"{algorithm} has no formula in lowmem.memory.state_formulas: add one to FORMULAS"
        )
    return FORMULAS[algorithm](with_defaults(algorithm, settings), shape)


def storage_format(tensor: StateTensor, settings: Settings) -> str:
    """Of `tensor` under the `storage` setting."""
    if tensor.role in _FIXED_FORMATS:
        return _FIXED_FORMATS[tensor.role]
    return (settings.get("storage") or {}).get(tensor.role, "param")


def stored_itemsize(tensor: StateTensor, settings: Settings, param_itemsize: int) -> int:
    """Bytes of a value of `tensor`, without scales; of one in int4, which takes half a byte, 1."""
    chosen = storage_format(tensor, settings)
    return param_itemsize if chosen == "param" else _FORMAT_BYTES[chosen]


def stored_sizes(tensor: StateTensor, settings: Settings, param_itemsize: int) -> list[int]:
    """Bytes of each tensor that `tensor` is kept in: codes, scales and zeros where it is in few bits."""
    chosen, numel = storage_format(tensor, settings), tensor.numel
    if chosen == "int8":
        return [numel, 4 * -(-numel // INT8_BLOCK)]
    if chosen == "int4":
        groups = -(-numel // INT4_GROUP)
        return [-(-numel // 2), 2 * groups, groups]
    return [numel * stored_itemsize(tensor, settings, param_itemsize)]


def state_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, round_to: int = 1) -> int:
    """Bytes of state of a parameter whose values take `itemsize` bytes, `step` included, each tensor rounded up."""
    if math.prod(shape) == 0 or is_untouched(algorithm, settings):
        return 0
    settings = with_defaults(algorithm, settings)
    tensors = state_values(algorithm, settings, shape).values()
    sizes = [size for each in tensors for size in stored_sizes(each, settings, itemsize)]
    return sum(rounded(size, round_to) for size in (*sizes, STEP_BYTES))


@dataclass(frozen=True)
class Treatment:
    """Which optimizer updates a parameter, with all its settings."""

    parameter: Parameter
    algorithm: str
    settings: Settings


def treatments(optimizer: OptimizerRecipe, parameters: Sequence[Parameter]) -> list[Treatment]:
    """Who updates what, as `build_optimizer` divides a model: first the optimizer itself, then the head's, the groups',
    then its fallback. Where they take turns, those that rest in the fullest one say so.

    Raises RecipeError for a target that matches no linear layer, and for groups as `claimed` does.
    """
    return in_fullest_turn(all_treatments(optimizer, parameters))


def all_treatments(optimizer: OptimizerRecipe, parameters: Sequence[Parameter]) -> list[Treatment]:
    """Likewise, whoever's turn it is. Those with the same settings, by identity, are a group."""
    settings = with_defaults(optimizer.name, optimizer.settings)
    special = _of_head_and_groups(optimizer, parameters, settings)
    taken = {each.parameter.name for each in special}
    free = [each for each in parameters if each.name not in taken]
    if optimizer.name not in TREATS_MATRICES and optimizer.fallback is None:
        return [*(Treatment(each, optimizer.name, settings) for each in free), *special]
    for pattern in optimizer.target:
        if not any(each.is_linear and pattern in each.name for each in parameters):
            raise RecipeError(f"optimizer: target {pattern!r} matches no linear layer of the model.")
    rest_name, rest = _settings_of_other(optimizer.fallback, optimizer.name, settings)
    mine: list[Treatment] = []
    others: list[Treatment] = []
    for each in free:
        if each.is_linear and any(pattern in each.name for pattern in optimizer.target):
            mine.append(Treatment(each, optimizer.name, settings))
        else:
            others.append(Treatment(each, rest_name, rest))
    return [*mine, *special, *others]


def _of_head_and_groups(
    optimizer: OptimizerRecipe, parameters: Sequence[Parameter], settings: Settings
) -> list[Treatment]:
    of_head = None if optimizer.head is None else _head_of(parameters)
    found: list[Treatment] = []
    if of_head is not None:
        found.append(Treatment(of_head, *_settings_of_other(optimizer.head, optimizer.name, settings)))
    try:
        named = [(each.name, each) for each in parameters]
        patterns = [each["match"] for each in optimizer.groups]
        members_of_groups = claimed(named, patterns, head=None if of_head is None else of_head.name)
    except ValueError as error:
        raise RecipeError(f"optimizer: {error}") from error
    for group, members in zip(optimizer.groups, members_of_groups, strict=True):
        other = {"name": optimizer.name, **group}
        del other["match"]
        treated_by = _settings_of_other(other, optimizer.name, settings)
        found += [Treatment(each, *treated_by) for _, each in members]
    return found


def _settings_of_other(other: Settings | None, name: str, own: Settings) -> tuple[str, dict[str, Any]]:
    """Name and settings of `fallback`, `head` or a group, which take from `own` what they do not say."""
    chosen = dict(other or {"name": "adamw"})
    other_name = chosen.pop("name")
    inherited = own if other_name == name else {}
    return other_name, with_defaults(other_name, {**inherited, "rounding": own["rounding"], **chosen})


def _head_of(parameters: Sequence[Parameter]) -> Parameter | None:
    """The output head, or the embedding that is its weight too."""
    by_name = {each.name: each for each in parameters}
    return by_name.get("lm_head.weight", by_name.get("model.embed_tokens.weight"))


def in_fullest_turn(found: list[Treatment], numels: Sequence[int] | None = None) -> list[Treatment]:
    """With the settings of those that rest in the fullest turn saying so.

    numels: how many values of each count, where that is not all of them.
    """
    treated = [(each.algorithm, each.settings, each.parameter) for each in found]
    resting = resting_in_the_fullest_turn(treated, numels)
    at_rest = {id(each.settings): {**each.settings, "rests": True} for each in found}
    return [
        replace(each, settings=at_rest[id(each.settings)]) if position in resting else each
        for position, each in enumerate(found)
    ]


BITSANDBYTES_TABLES_BYTES = 2 * 256 * 4
"""The two tables that 8-bit codes are looked up in; all parameters share them."""


def adamw8bit_state_bytes(numel: int, *, round_to: int = 1) -> int:
    """The state of bitsandbytes' own AdamW8bit: that of `adamw8bit`, but steps are counted in Python."""
    return state_bytes("adamw8bit", {}, (numel,), 4, round_to=round_to) - rounded(STEP_BYTES, round_to)
