# ruff: noqa: E501 -- prose

"""The text of docs/execution.md; its table comes from the code that chooses and refuses."""

from __future__ import annotations

import itertools

import torch

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.recipe.execution_choice import Situation, chosen_mode, objection

WAYS = ("plain", "project", "fused")
CLIPS = (
    ("none", "applied", False),
    ("applied", "applied", True),
    ("full", "full", True),
    ("tensor", "tensor", True),
)

TEXT = """\
# How a step is made

Made by `make docs`; the table at the end comes from the code that chooses and refuses.

```yaml
train: {execution: auto}                                   # auto | plain | project | fused
optimizer: {clip: applied, refresh_from: boundary}         # what max_grad_norm limits; whose gradient a basis is fitted to
```

| execution | gradients held | what happens |
|---|---|---|
| `plain` | every one, until the step | the usual loop |
| `project` | those of matrices projected (rank x long side), the others whole | the gradient of a matrix with a low-rank rule is projected as it arrives, added to the sum over micro-batches and freed |
| `fused` | one at a time | each parameter is updated as its gradient arrives, and the gradient is freed |

The update is made by the same code in all three. `fused` gives the bits of `plain` where nothing is clipped; `project`
gives its weights up to the order in which numbers are added. All of them work with gradient accumulation, non-reentrant
activation checkpointing, schedules, resume (bit for bit) and plain data parallel training.

`auto` takes `fused` for one micro-batch a step without global clipping, else `project` where the optimizer projects, else
`plain`. A run prints what was chosen, the bytes of its gradients and what it means; `lowmem plan` simulates it.

**Accumulation.** `project` adds up projected gradients, in the dtype of `optimizer.accumulator`. `fused` with several
micro-batches adds up gradients as usual and uses and frees each in the last one: exact, but no leaner than `plain`
before that.

**Clipping.** With `clip: applied` (the default) `train.max_grad_norm` limits the norm of what the rules use: projected
gradients where there are any, whole ones otherwise; the same in `plain` and `project`. `full` limits the norm of the
whole gradients. `tensor` clips every gradient by itself, to a root mean square of max_grad_norm / sqrt(all trained
values): the norm of all is then at most max_grad_norm, and no gradient has to wait for another, so `fused` can do it.
Logged as `grad_norm` is the norm before clipping; one that cannot be known is left out, never 0.

**Refreshing a basis.** A parameter's first basis is fitted to the gradient of the first micro-batch. Later ones are fitted
to the whole gradient of the step (`refresh_from: boundary`), for which `project` keeps the gradients of the few matrices
whose turn it is until the last micro-batch, or to that of the first micro-batch (`first_micro_batch`).

**Not finite.** `plain` and `project` leave out the whole step, `fused` the parameters concerned, or all when the loss
itself is not finite. Each is counted and said with the name of a parameter; more than 20 in a row stop the run.

**In your own Trainer**:

```python
class MyTrainer(lowmem.hf.LowMemTrainerMixin, SFTTrainer): ...

MyTrainer(..., optimizer_cls_and_kwargs=lowmem.hf.optimizer("galore", lr=1e-4, rank=256), execution="auto", clip="applied")
```

Without the mixin, `optimizer_cls_and_kwargs` alone gives `plain` steps with the Trainer's own clipping.

## What works

"""


def projects(name: str) -> bool:
    """Whether the optimizer's rule for a large matrix sees its gradient through a projection only."""
    owner = optimizer_class(name)
    (group,) = owner([torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))]).param_groups
    return owner.rule(group, (1024, 1024)).is_projected


def execution_page() -> str:
    """The page, with every combination of optimizer, execution, accumulation and clipping counted."""
    lines = [
        "| optimizer | micro-batches | clip | plain | project | fused | auto |",
        "|---|---|---|---|---|---|---|",
    ]
    reasons: list[str] = []
    works = refused = 0
    for name, micro_batches, (shown, clip, clips) in itertools.product(OPTIMIZERS, (1, 4), CLIPS):
        at = Situation(projects(name), micro_batches, clip, clips)  # type: ignore[arg-type]
        cells = []
        for way in WAYS:
            reason = objection(way, at)  # type: ignore[arg-type]
            works, refused = works + (reason is None), refused + (reason is not None)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(
            f"| {name} | {micro_batches} | {shown} | {' | '.join(cells)} | {chosen_mode('auto', at)} |"
        )
    count = f"{works} combinations work, {refused} are refused:"
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return TEXT + "\n".join([*lines, "", count, "", *notes, ""])
