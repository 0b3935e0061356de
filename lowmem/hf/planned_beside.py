"""The plan of the very steps that a run has measured, to hold the two against each other."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.hf.recorded_batches import Batch
from lowmem.hf.simulated_run import simulate_run
from lowmem.memory.readings import Measured
from lowmem.recipe.schema import Recipe

SIMULATED_MICRO_BATCHES = 4


def plan_of_measured_steps(
    recipe: Recipe, steps: Sequence[Sequence[Batch]], *, on_cuda: bool, world_size: int
) -> Measured | str:
    """A simulation of `steps`, the recorded micro-batches, or in words why there is none.

    Of many micro-batches the first, the longest and the last are simulated: the others make nothing that is
    new. A failure here is told and does not undo a run that is done.
    """
    if not steps:
        return "no step was recorded"
    if world_size > 1:
        return "the buffers of data parallel training are not simulated yet"
    chosen = [list(step) if len(step) <= SIMULATED_MICRO_BATCHES else _telling(step) for step in steps]
    left_out = max(_nbytes(step) - _nbytes(kept) for step, kept in zip(steps, chosen, strict=True))
    try:
        return simulate_run(recipe, chosen, on_cuda=on_cuda, batches_left_out_bytes=left_out).measured
    except Exception as error:  # the run's own result stands, whatever the simulation met
        return f"the simulation failed: {type(error).__name__}: {error}"


def _telling(step: Sequence[Batch]) -> list[Batch]:
    first, *others, last = step
    return [first, max(others, key=lambda batch: batch["input_ids"].numel()), last]


def _nbytes(step: Sequence[Batch]) -> int:
    return sum(value.nbytes for batch in step for value in batch.values())
