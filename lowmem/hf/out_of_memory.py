"""What to tell someone whose device was too small: what the plan says was needed, and what would fit."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from lowmem.errors import LowMemError
from lowmem.hf.plan import plan
from lowmem.memory.cards import LARGEST_BYTES
from lowmem.memory.ledger import PARTS
from lowmem.memory.plan_document import MemoryPlan
from lowmem.memory.wording import PART_NAMES, size
from lowmem.recipe.schema import Recipe

CHANGES = 3

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def card_memory() -> tuple[int, int] | None:
    """(free, all) bytes of the GPU, None without one."""
    return torch.cuda.mem_get_info() if torch.cuda.is_available() else None


def host_memory() -> int:
    """Bytes that this process may have: of the machine, its container, or what it was limited to."""
    limits = [LARGEST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        limits += [soft] if soft != resource.RLIM_INFINITY else []
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def out_of_memory_advice(recipe: Recipe, error: RuntimeError) -> str:
    """The first line of `error`, the planned parts, and the cheapest changes that would fit the card, or the host.

    Where the formulas do not know the model, or find that it should have fitted, what usually helps, nearest first.
    """
    memory = card_memory()
    card = f"the card has {size(memory[1])}, {size(memory[0])} free now" if memory else ""
    all_bytes = memory[1] if memory else host_memory()
    has = card or f"this process may have {size(all_bytes)} of the host's memory"
    found = f"The device is out of memory ({has}): {str(error).splitlines()[0]}"
    try:
        planned = plan(recipe, gpu=f"{all_bytes}B", formula=True)
    except LowMemError:
        return f"{found} Try, in this order: {'; '.join(_usual_advice(recipe))}."
    changes = [" ".join(change["overrides"]) for change in planned.document["changes_that_fit"]][:CHANGES]
    would = (
        f"Would fit: {'; '.join(changes)}"
        if changes
        else f"Try, in this order: {'; '.join(_usual_advice(recipe))}"
    )
    return f"{found} {_parts(planned)} {would}. lowmem plan says more."


def _parts(planned: MemoryPlan) -> str:
    parts = ", ".join(
        f"{PART_NAMES[part]} {size(planned.parts[part])}" for part in PARTS if planned.parts[part]
    )
    return f"By plan the training step needs {size(planned.peak_bytes)}: {parts}."


def _usual_advice(recipe: Recipe) -> list[str]:
    """What to change, nearest first, of what the recipe has not done yet."""
    advice = []
    if not recipe.train.activation_checkpointing:
        advice.append("train.activation_checkpointing=true")
    if recipe.train.loss != "chunked":
        advice.append("train.loss=chunked")
    if recipe.train.per_device_batch_size > 1:
        advice.append("a smaller train.per_device_batch_size with more train.gradient_accumulation_steps")
    advice.append(f"a data.max_length below {recipe.data.max_length}")
    if recipe.lora is None:
        advice.append("lora: {r: 16}")
    return advice
