# ruff: noqa: E501 -- prose

"""Write docs/scaling.md: what each of 8 to 1024 processes holds and sends, from the formulas that `lowmem plan` uses.

    python scripts/make_scaling_page.py

A test holds the page equal to what this script gives.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from model_shapes import MODELS

from lowmem.memory.architecture import Architecture
from lowmem.memory.divided_buffers import tail_numel
from lowmem.memory.divided_estimate import divided_estimate
from lowmem.memory.divided_exchange import (
    BATCH_NUMEL,
    sent_bytes,
    updated_one_after_another,
)
from lowmem.memory.divided_pieces import Division, Shown, Strategy, divided
from lowmem.memory.divided_state import divided_state_bytes, itemsize_of_stepped
from lowmem.memory.divided_traffic import strategy_sent_values
from lowmem.memory.refresh_flops import refresh_flops
from lowmem.memory.state_formulas import all_treatments
from lowmem.recipe.schema import (
    DataRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    SourceRecipe,
    TrainRecipe,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
GIB, ITEMSIZE = 2**30, 2
WORLDS = (8, 64, 512, 1024)
DIVIDED: tuple[Strategy, ...] = ("fsdp2", "zero1", "zero3")
RANK, EVERY = 1024, 200

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "sgd_sai": ("sgd_sai", {}),
    "adafactor": ("adafactor", {}),
    "galore": ("galore", {"rank": RANK}),
    "galore, rank 128": ("galore", {"rank": 128}),
    "q_galore": ("q_galore", {"rank": RANK}),
    "frugal": ("frugal", {}),
    "swan": ("swan", {}),
    "sinkgd": ("sinkgd", {}),
}

SHOWN_MODELS = ("LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-2-70B")

TEXT = """\
# Many GPUs, on paper

Made by `scripts/make_scaling_page.py` from the formulas behind [`lowmem plan --world N`](plan.md#several-processes). It says
what a process holds and sends when 8, 64, 512 or 1024 of them, one a GPU, train LLaMA-2 models under
[DDP, FSDP2, ZeRO-1 or ZeRO-3](distributed.md), and what work its matrices are.

## What is known, and how

- **Never measured: any of it at these sizes.** No GPU, no NCCL, no network between machines. Tests hold the formulas equal
  to two and three processes over gloo: weights, gradients, optimizer state, what is sent for matrices, FSDP2's collectives.
- So there are no seconds here. Bytes become time by the bandwidth of a network and its overlap with computation, operations
  by what a GPU reaches on such shapes; neither is known.
- Memory is the peak of the fullest process by formula: exact for weights, gradients and state, bounds for what FSDP2 and ZeRO
  gather (up to 1e9 values under ZeRO-3, its default) and for buckets (5e8 values under ZeRO); without NCCL's buffers, the
  CUDA context and the allocator's reserve.
- Sent is what a process sends in a step: of the strategy's own collectives as around a ring, of matrices as the code sends
  them. Which links carry it, inside a machine or between machines, is not told apart.
- The work of each process: bfloat16 weights, one micro-batch of 1 x 2048 tokens, activation checkpointing, chunked loss.
  Settings are the defaults, with rank RANK for galore and q_galore; their embeddings, norms and heads have AdamW, and so have
  those of frugal, swan and sinkgd. q_galore has bfloat16 weights here, since [int8 weights cannot be divided](distributed.md).
  Under ZeRO DeepSpeed steps float32 weights, and state that follows the weight's dtype is float32.

## What follows from it

- **Rows that need little of each other are updated where they are**: all matrices of sinkgd, adafactor and frugal, those of
  galore that are not wide while its basis is no more than a quarter of a process' share of the matrix. A few sums are sent.
- **State is divided by W until there are as many processes as matrices.** Any other matrix is updated whole by one process.
  LLaMA-2-7B has MATRICES of them under galore of rank RANK, so of 512 processes NONE own none, and the state of the fullest
  stays that of the largest matrix and its share of the rest. By then state is a small part of what a process holds.
- **More processes than matrices do not make updates faster.** *Updates at the same time* below is how many times faster all of
  them are than one process would be, if all owners are equally fast and sending takes no time. It stays below the number of
  processes since an owner has BATCH values of matrices at one time, or one larger matrix, and others wait for the slowest.
- **Sending for matrices fades beside the strategy.** With equal pieces it is 3 m n (W - 1) / W^2 values of a matrix, once a
  step, while FSDP2 and ZeRO-3 send about three times all values in every micro-batch. Under ZeRO-1 only what lies across a
  border travels. An owner of a large matrix sends that back whole, which is the most that a process sends with many of them.
  Not counted are refreshes by rows, for which every process has the whole gradient.
- **ZeRO-1 and DDP keep all weights, and ZeRO-1 all gradients, in every process**, whatever W is: GIB_70B GiB of weights alone
  for 70B.
- **DDP is where projected gradients help**: galore and q_galore keep and average projections there (whole gradients in a step
  with a refresh), which FSDP2 and ZeRO, that divide gradients themselves, have no use for.
"""


def recipe_for(optimizer: str, model: str) -> Recipe:
    name, settings = OPTIMIZERS[optimizer]
    return Recipe(
        model=ModelRecipe(name_or_path=model),
        data=DataRecipe(train=SourceRecipe(builtin="arithmetic"), max_length=2048),
        optimizer=OptimizerRecipe(name=name, settings={"lr": 1e-4, **settings}),
        train=TrainRecipe(activation_checkpointing=True),
    )


@cache
def architecture(model: str) -> Architecture:
    return Architecture.from_config(MODELS[model])


@cache
def shown(model: str, strategy: Strategy, processes: int, optimizer: str = "galore") -> list[Shown]:
    treated = all_treatments(recipe_for(optimizer, model).optimizer, architecture(model).parameters)
    return divided(treated, strategy, processes)


def gib(nbytes: float) -> str:
    value = nbytes / GIB
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def header(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def memory_row(model: str, optimizer: str) -> str:
    """GiB of the fullest process under each strategy, for each number of processes."""
    recipe, shape = recipe_for(optimizer, model), architecture(model)

    def peak(strategy: Strategy, processes: int) -> str:
        return gib(divided_estimate(recipe, shape, strategy, processes).fullest.peak_bytes)

    cells = [" / ".join(peak(strategy, world) for world in WORLDS) for strategy in DIVIDED]
    return row(f"`{optimizer}`", peak("ddp", WORLDS[0]), *cells)


def sent_rows(model: str) -> list[str]:
    """GiB that a process sends in a step."""
    shape = architecture(model)
    numel, tail = shape.num_parameters, tail_numel(shape)
    lines = []
    for strategy in ("ddp", *DIVIDED):
        own = [ITEMSIZE * strategy_sent_values(strategy, numel, world, 1, tail=tail) for world in WORLDS]
        cells = [gib(nbytes) for nbytes in own]
        if strategy == "ddp":
            lines.append(row(strategy, *cells, *["-"] * len(WORLDS)))
            recipe = recipe_for("galore", model)
            projected = [divided_estimate(recipe, shape, strategy, world).strategy_sent for world in WORLDS]
            lines.append(row("ddp, galore", *map(gib, projected), *["-"] * len(WORLDS)))
            continue
        itemsize = itemsize_of_stepped(strategy, ITEMSIZE)
        most = [max(sent_bytes(shown(model, strategy, world), world, itemsize)) for world in WORLDS]
        lines.append(row(strategy, *cells, *(gib(nbytes) for nbytes in most)))
    return lines


def optimizer_row(model: str, optimizer: str) -> str:
    """What an optimizer has a process send in a step under FSDP2, and how many matrices are updated by rows."""
    groups = [shown(model, "fsdp2", world, optimizer) for world in WORLDS]
    by_rows = [sum(each.on_rows is not None for group in found for each in group) for found in groups]
    sent = [max(sent_bytes(found, world, ITEMSIZE)) for found, world in zip(groups, WORLDS, strict=True)]
    return row(f"`{optimizer}`", *(gib(nbytes) for nbytes in sent), " / ".join(map(str, by_rows)))


def owned(model: str, processes: int) -> dict[int, list[Division]]:
    """The matrices of each process under FSDP2."""
    found: dict[int, list[Division]] = {rank: [] for rank in range(processes)}
    for group in shown(model, "fsdp2", processes):
        for each in group:
            if each.owner is not None:
                found[each.owner].append(each)
    return found


def owner_row(model: str, processes: int) -> str:
    """What the matrices of GaLore are to their owners."""
    mine = owned(model, processes)
    counts = [len(matrices) for matrices in mine.values()]
    groups = shown(model, "fsdp2", processes)
    state = divided_state_bytes(groups, processes, ITEMSIZE)
    numel = sum(each.numel for matrices in mine.values() for each in matrices)
    speed_up = numel / updated_one_after_another(groups)

    def most(*, is_first: bool) -> float:
        flops = (
            sum(refresh_flops(each.treatment.parameter.shape, RANK, is_first=is_first) for each in matrices)
            for matrices in mine.values()
        )
        return max(flops) / 1e12

    return row(
        str(processes),
        f"{min(counts)} to {max(counts)}",
        f"{gib(min(state))} to {gib(max(state))}",
        f"{speed_up:.1f}",
        f"{most(is_first=True):.2f}",
        f"{most(is_first=False):.2f}",
        f"{most(is_first=False) / EVERY:.4f}",
    )


def section(model: str) -> list[str]:
    worlds = " / ".join(str(world) for world in WORLDS)
    shape = architecture(model)
    return [
        f"## {model}: {shape.num_parameters:,} parameters",
        "",
        f"GiB of the fullest process; {worlds} processes:",
        "",
        *header("optimizer", "ddp, any number", *DIVIDED),
        *(memory_row(model, optimizer) for optimizer in OPTIMIZERS),
        "",
        f"GiB that a process sends in a step, for the strategy and, with galore of rank {RANK}, for matrices (the most of any):",
        "",
        *header("strategy", *(f"{world}" for world in WORLDS), *(f"matrices, {world}" for world in WORLDS)),
        *sent_rows(model),
        "",
        "The same by optimizer under FSDP2, in a step without a refresh, and matrices that are updated by rows:",
        "",
        *header("optimizer", *(str(world) for world in WORLDS), f"by rows, {worlds}"),
        *(optimizer_row(model, optimizer) for optimizer in OPTIMIZERS),
        "",
        f"Owners of matrices under FSDP2, with galore of rank {RANK}; refreshes in 1e12 operations of the owner with most, once every {EVERY} steps, "
        "and staggered over them:",
        "",
        *header(
            "processes",
            "matrices of each",
            "state GiB",
            "updates at the same time",
            "first bases",
            "a refresh of all",
            "a step, on average",
        ),
        *(owner_row(model, world) for world in WORLDS),
        "",
    ]


REFRESH = f"""\
A basis of rank {RANK} is fitted by subspace iteration, of which matrix products and what makes columns orthonormal are counted
(`lowmem/memory/refresh_flops.py`): torch's own count holds the products. What adamw and sgd_sai step has no
owner, is not sent and needs no refresh; adafactor has owners for norms, whose clipping needs all of a tensor. A basis that is
fitted by rows is fitted by every process.
"""


def text() -> str:
    counts = [len(matrices) for matrices in owned("LLaMA-2-7B", 512).values()]
    numbers = {
        "RANK": str(RANK),
        "BATCH": f"{BATCH_NUMEL:,}",
        "MATRICES": str(sum(counts)),
        "NONE": str(counts.count(0)),
        "GIB_70B": gib(ITEMSIZE * architecture("LLaMA-2-70B").num_parameters),
    }
    found = TEXT
    for word, number in numbers.items():
        found = found.replace(word, number)
    return found


def scaling_page() -> str:
    lines = [line for model in SHOWN_MODELS for line in section(model)]
    return "\n".join([text(), *lines, REFRESH])


if __name__ == "__main__":
    PAGE.write_text(scaling_page())
    print(f"wrote {PAGE}")
