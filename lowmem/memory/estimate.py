"""The memory of a training step by formula: a second instead of a simulation, and no torch.

Weights, gradients and optimizer state are sums over the parameters (`estimate_method.py`); activations come
from a tape of sizes (`activation_profile.py`). Together they make the moments that can be the fullest: each kind
of micro-batch that the step's execution has (`execution_formulas.py`), and the optimizer's update after the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowmem.memory.activation_operators import Work
from lowmem.memory.activation_profile import Profile, profile
from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import CUBLAS_BYTES
from lowmem.memory.estimate_method import BASELINES, Method, baseline_method, recipe_method
from lowmem.memory.host_memory import SMALLEST_OFFLOADED_BYTES, pinned_bytes
from lowmem.memory.ledger import PARTS, Part, Phase
from lowmem.recipe.schema import Recipe

__all__ = ["BASELINES", "Estimate", "estimate", "estimate_baseline", "estimate_method"]

ALLOWANCE = 0.05
"""Part of the peak for blocks of the caching allocator that are free and fit nothing. With memory to spare it
reserves more; when the device is full it gives back what is wholly free, and this is about what remains."""

PAD_TO = 8
"""Rows that are not packed are padded to a multiple of this."""


@dataclass(frozen=True)
class Estimate:
    """The fullest moment of a step, in bytes. The parts sum to the peak."""

    peak_bytes: int
    reserved_bytes: int
    """The peak and ALLOWANCE: what a card must have for it."""
    parts: dict[Part, int]
    phase: Phase
    conditions: dict[str, Any]
    pinned_host_bytes: int = 0
    """For activations that are moved to the host."""


def estimate(
    recipe: Recipe,
    architecture: Architecture,
    *,
    sequence_length: int | None = None,
    masked: bool = True,
    on_cuda: bool = True,
) -> Estimate:
    """One training step of `recipe` on rows of `sequence_length` tokens (data.max_length where it is None).

    masked: attention needs an explicit mask, for padding or packing. on_cuda: CUDA's workspaces are added, and
    gradients of what was used several times are added up in place. Raises RecipeError for a target that matches
    nothing, RefusedError for an execution that cannot do what is asked for.
    """
    method = recipe_method(recipe, architecture, on_cuda=on_cuda)
    return estimate_method(
        method, recipe, architecture, sequence_length=sequence_length, masked=masked, on_cuda=on_cuda
    )


def estimate_baseline(
    name: str,
    recipe: Recipe,
    architecture: Architecture,
    *,
    sequence_length: int | None = None,
    masked: bool = True,
    on_cuda: bool = True,
) -> Estimate:
    """The same work by another method, one of BASELINES. Raises ValueError for another name."""
    method = baseline_method(name, recipe, architecture)
    return estimate_method(
        method, recipe, architecture, sequence_length=sequence_length, masked=masked, on_cuda=on_cuda
    )


def estimate_method(
    method: Method,
    recipe: Recipe,
    architecture: Architecture,
    *,
    sequence_length: int | None = None,
    masked: bool = True,
    on_cuda: bool = True,
) -> Estimate:
    """The work of `recipe` by `method`."""
    work = work_of(
        method, recipe, architecture, sequence_length=sequence_length, masked=masked, on_cuda=on_cuda
    )
    micro_batches = recipe.train.gradient_accumulation_steps
    batch = 3 * 8 * work.rows * work.tokens
    always: dict[Part, int] = dict.fromkeys(PARTS, 0)
    always |= {"weights": method.weights, "optimizer_state": method.state}
    always["other"] = (CUBLAS_BYTES if on_cuda else 0) + (micro_batches - 1) * batch

    moments: list[tuple[Phase, dict[Part, int]]] = []
    for each in method.passes:
        before: dict[Part, int] = {**always, "gradients": each.gradients, "optimizer_state": each.state}
        moments.append(_moment(profile(architecture, work, each.arrivals), before))
    end: dict[Part, int] = {**always, "gradients": method.end.gradients, "temporary": method.end.temporary}
    moments.append(("optimizer", {**end, "other": always["other"] + batch}))
    phase, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    peak = sum(parts.values())
    conditions = conditions_of(method, recipe, architecture, work)
    pinned = architecture.layers * pinned_bytes(_input_bytes(work, architecture)) if work.offloading else 0
    return Estimate(peak, reserved_for(peak), parts, phase, conditions, pinned)


def work_of(
    method: Method,
    recipe: Recipe,
    architecture: Architecture,
    *,
    sequence_length: int | None,
    masked: bool,
    on_cuda: bool,
) -> Work:
    tokens = recipe.data.max_length if sequence_length is None else sequence_length
    if not recipe.data.packing:
        tokens = -(-tokens // PAD_TO) * PAD_TO
    attention = recipe.model.attn
    window = architecture.sliding_window
    needs_mask = masked or attention == "eager" or (window is not None and tokens >= window)
    work = Work(
        rows=recipe.train.per_device_batch_size,
        tokens=tokens,
        itemsize=method.itemsize,
        masked=needs_mask and attention != "flash_attention_2",
        eager=attention == "eager",
        checkpointing=recipe.train.activation_checkpointing,
        chunked_loss=recipe.train.loss == "chunked",
        packed=recipe.data.packing,
        on_cuda=on_cuda,
        adapters=method.adapters,
        by_rows=method.by_rows,
    )
    is_large = _input_bytes(work, architecture) >= SMALLEST_OFFLOADED_BYTES
    return replace(
        work, offloading=recipe.train.activation_offload and work.checkpointing and on_cuda and is_large
    )


def _input_bytes(work: Work, architecture: Architecture) -> int:
    """Of one layer."""
    return work.rows * work.tokens * architecture.hidden * work.itemsize


def reserved_for(peak_bytes: int) -> int:
    """Peak and ALLOWANCE."""
    return peak_bytes + int(ALLOWANCE * peak_bytes)


def _moment(above: Profile, always: dict[Part, int]) -> tuple[Phase, dict[Part, int]]:
    return above.phase, {part: always[part] + above.parts[part] for part in PARTS}


def conditions_of(method: Method, recipe: Recipe, architecture: Architecture, work: Work) -> dict[str, Any]:
    return {
        "model_type": architecture.model_type,
        "parameters": method.parameters,
        "trained_parameters": method.trained_parameters,
        "dtype": recipe.model.dtype,
        "sequence_length": work.tokens,
        "per_device_batch_size": work.rows,
        "gradient_accumulation_steps": recipe.train.gradient_accumulation_steps,
        "execution": method.mode,
        "activation_checkpointing": work.checkpointing,
        "activation_offload": recipe.train.activation_offload and work.on_cuda,
        "loss": recipe.train.loss,
        "attn": recipe.model.attn,
        "attention_mask": work.masked,
    }
