"""Going through a graph twice, where a gradient is used and freed the first time."""

from __future__ import annotations

from lowmem.errors import RefusedError

_TORCHS_WORDS = "modified by an inplace operation"

_WHAT_TO_DO = (
    "Call backward once for each micro-batch, on the sum of its losses, as in (loss_1 + loss_2).backward(). A "
    "Trainer that overrides training_step must call super().training_step for the forward and the backward pass. "
    "A weight that is shared between checkpointed layers needs use_reentrant=False. Or use train.execution: plain."
)


def second_backward(mode: str, name: str) -> RefusedError:
    """The gradient of `name` has arrived again in a micro-batch."""
    used = "has moved the weight by" if mode == "fused" else "has projected and freed"
    return RefusedError(
        f"The gradient of {name} arrived twice in one micro-batch, and train.execution: {mode} {used} the first. "
        + _WHAT_TO_DO
    )


def explained(error: RuntimeError, mode: str) -> RefusedError | None:
    """The same for torch's error about a weight that moved before a retained graph was gone through again."""
    if mode != "fused" or _TORCHS_WORDS not in str(error):
        return None
    return RefusedError(
        "A backward pass needed a weight that train.execution: fused had already moved, as backward(retain_graph=True) "
        "and a second backward do. " + _WHAT_TO_DO
    )
