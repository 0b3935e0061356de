# ruff: noqa: E501 -- prose

"""The text of docs/execution.md; its table comes from the code that chooses and refuses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from reference_pages.markdown import table

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.run.choose import chosen_mode, objection, situation_of

WAYS = ("plain", "project", "fused")
CLIPS = (
    ("none", "applied", False),
    ("applied", "applied", True),
    ("full", "full", True),
    ("tensor", "tensor", True),
)
SETTINGS = [
    *((name, name, {}) for name in OPTIMIZERS),
    ("sgd, momentum 0.9", "sgd", {"momentum": 0.9}),
    ("sgd, nesterov", "sgd", {"momentum": 0.9, "nesterov": True}),
]
"""What a row is called, its optimizer, and settings other than the defaults."""

MATRIX = (512, 512)
"""Larger than any default rank."""

TEXT = """\
# How a step is made

Made by `make docs`; the table at the end comes from the code that chooses and refuses.

```yaml
train: {execution: auto, head_gradient: auto}              # auto | plain | project | fused; auto | whole
optimizer: {clip: applied, refresh_from: boundary}         # what max_grad_norm limits; whose gradient a basis is fitted to
```

| execution | gradients held | what happens |
|---|---|---|
| `plain` | every one, until the step | the usual loop |
| `project` | those of matrices projected (rank x long side), the others whole | the gradient of a matrix with a low-rank rule is projected as it arrives, added to the sum over micro-batches and freed |
| `fused` | one at a time | each parameter is updated as its gradient arrives, or with several micro-batches its momentum, and the gradient is freed |

The update is made by the same code in all three. `fused` gives the bits of `plain` where nothing is clipped and nothing
is added up in a momentum; otherwise `fused`, and always `project`, give its weights up to the order in which numbers are
added. All of them work with gradient accumulation, activation checkpointing, schedules, resume (bit for bit) and plain
data parallel training.

`auto` takes `fused` where that holds one gradient at a time and there is no global clipping, else `project` where the
optimizer projects, else `plain`. A run prints what was chosen, the bytes of its gradients and what it means; `lowmem
plan` simulates it.

**Accumulation.** `project` adds up projected gradients, in the dtype of `optimizer.accumulator`. `fused` adds each
micro-batch's gradient to the momentum and frees it, where the momentum is a sum of gradients: SGD with momentum, and
SGD-SaI but for its first step, which takes its ratios from a whole gradient and has no momentum yet. A momentum in
bfloat16 is rounded stochastically each time. Other optimizers, SGD without momentum or with Nesterov's form, momentum
in low-bit codes and `clip: tensor` need the whole step's gradient: there `fused` adds gradients up as usual and uses
and frees each in the last micro-batch, which is exact, but no leaner than `plain` before that.

**Head and embedding.** They have the largest gradients of a model, vocabulary x width. With `train.head_gradient: auto`
`fused` never holds one: the chunked loss keeps the hidden states and one number a token, the look-up its tokens and output
gradients, and the rows of the gradient are made from these, used and dropped, some two million values at a time. A head
tied to its embedding waits until backward reaches that, and its rows are the sums of both. The input gradient is made
before any row changes, so rows are those of the whole gradient up to the order in which a matrix product adds. It applies
where it is exact: one micro-batch a step, one process, no clipping; for the head `train.loss: chunked` and a plain or int8
linear layer, for the embedding a plain or int8 one; an optimizer that can take rows, which all can but those that project
or whiten the weight. In every other case the gradient is whole, and the run says so. The price is time: a whole gradient takes four matrix products
of vocabulary x width x tokens a step, rows five, and two more for each further pass over the gradient (Adafactor makes
three passes: nine products). A gradient by rows is taken for finite where the loss and all it is made of are.

**Data parallel training.** `plain` and `project` average gradients once a step, `project` the projected ones. `fused`
averages each gradient that it adds to a momentum, so that all processes see the same: with M micro-batches a step that
is M times the traffic of `plain`.

**Clipping.** With `clip: applied` (the default) `train.max_grad_norm` limits the norm of what the rules use: projected
gradients where there are any, whole ones otherwise; the same in `plain` and `project`. `full` limits the norm of the
whole gradients. `tensor` clips every gradient by itself, to a root mean square of max_grad_norm / sqrt(all trained
values): the norm of all is then at most max_grad_norm, and no gradient has to wait for another, so `fused` can do it.
Logged are norms before clipping: `applied_grad_norm` of what the rules use, `full_grad_norm` of the whole gradients, and
`grad_norm`, the one that is clipped by, or else the one that is known. A norm that cannot be known is null in
`metrics.jsonl` and left out of a Trainer's log, never 0.

**Refreshing a basis.** A parameter's first basis is fitted to the gradient of the first micro-batch. Later ones are fitted
to the whole gradient of the step (`refresh_from: boundary`), for which `project` keeps the gradients of the few matrices
whose turn it is until the last micro-batch, or to that of the first micro-batch (`first_micro_batch`). An
optimizer that needs the whole gradient beside its projection, as Fira does, fits every basis to that.

**State in turn.** With `block_adam` the weights of all layers but the active one rest. From a step's first micro-batch
to its last they do not require gradients, so none are made and backward ends at the active layer; between steps they
do, as whoever counts or wraps the model expects. A turn is some whole steps, whatever `execution` is, and goes on after
a resume. Under data parallel training these parameters leave the reducer, which would wait for them, and are averaged
by the same code in all processes.

**Not finite.** `plain` and `project` leave out the whole step. `fused` leaves out the gradients concerned, or all of the
micro-batch when its loss is not finite, before they touch a weight or a momentum; what the step's other micro-batches
gave is used. Each such step is counted and said with the name of a parameter; more than 20 in a row stop the run.

**One backward pass.** `project` and `fused` use a gradient when it arrives, so each micro-batch goes backward once, on the
sum of its losses; a second pass, or a graph that is retained and gone through again, is refused. Layers may be compiled
one by one; a model compiled as a whole and a GradScaler keep all gradients until the step, and `auto` then takes `plain`.

**In your own Trainer**:

```python
class MyTrainer(lowmem.hf.LowMemTrainerMixin, SFTTrainer): ...

MyTrainer(..., optimizer_cls_and_kwargs=lowmem.hf.optimizer("galore", lr=1e-4, rank=256), execution="auto", clip="applied")
```

Without the mixin, `optimizer_cls_and_kwargs` alone gives `plain` steps with the Trainer's own clipping.

## What works

"""


@dataclass(frozen=True)
class Combination:
    """Whether each way of making a step works for an optimizer, a number of micro-batches and a way to clip."""

    micro_batches: int
    clip: str
    objections: tuple[str | None, ...]  # one for each of WAYS
    auto: str

    def cells(self, reasons: list[str]) -> list[str]:
        """Its part of a row. A reason that is not among `reasons` is added; cells name them by their number."""
        shown = []
        for reason in self.objections:
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            shown.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        return [str(self.micro_batches), self.clip, *shown, self.auto]


HEAD = ("micro-batches", "clip", *WAYS, "auto")


def combinations_of(name: str, settings: dict[str, Any]) -> list[Combination]:
    """What the code that chooses and refuses says of an optimizer of one matrix."""
    optimizer = optimizer_class(name)([torch.nn.Parameter(torch.empty(MATRIX, device="meta"))], **settings)  # type: ignore[call-arg]
    found = []
    for micro_batches, (shown, clip, clips) in itertools.product((1, 4), CLIPS):
        max_norm = 1.0 if clips else None
        at = situation_of(optimizer, micro_batches=micro_batches, clip=clip, max_norm=max_norm)  # type: ignore[arg-type]
        objections = tuple(objection(way, at) for way in WAYS)  # type: ignore[arg-type]
        found.append(Combination(micro_batches, shown, objections, chosen_mode("auto", at)))
    return found


def numbered(reasons: list[str]) -> list[str]:
    return [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]


def execution_page() -> str:
    """The page, with every combination of optimizer, execution, accumulation and clipping counted."""
    reasons: list[str] = []
    rows, works, refused = [], 0, 0
    for label, name, settings in sorted(SETTINGS, key=lambda each: list(OPTIMIZERS).index(each[1])):
        for each in combinations_of(name, settings):
            rows.append((label, *each.cells(reasons)))
            works += each.objections.count(None)
            refused += len(WAYS) - each.objections.count(None)
    count = f"{works} combinations work, {refused} are refused:"
    lines = table(("optimizer", *HEAD), rows)
    return TEXT + "\n".join([*lines, "", count, "", *numbered(reasons), ""])
