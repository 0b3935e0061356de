"""docs/optimizers/README.md: all optimizers in one table, how their state is stored, and by hand which one to take."""

from __future__ import annotations

import inspect
import re

from reference_pages.hand_written import hand_written
from reference_pages.llama_state import SMALL_FALLBACK, state_bytes
from reference_pages.markdown import table
from reference_pages.matrix_costs import gradient_needed, rule_and_settings, state_values
from reference_pages.optimizer_page import FOLDER, linked
from reference_pages.state_storage import storage_section

from lowmem.memory.wording import in_unit
from lowmem.optim.registry import OPTIMIZERS, optimizer_class

GIB = ("GiB", 2**30)
INDEX = FOLDER / "README.md"
HEAD = (
    *(
        "optimizer",
        "state of a matrix (m, n), values",
        "state of 7B, GiB",
        "with `fallback: {name: adafactor}`",
    ),
    *("of a gradient it needs", "`project`", "as `fallback`, `head`", "source"),
)
LEGEND = """\
State is counted with each optimizer's defaults: of a matrix with m <= n, r being `rank` and k = `density` n, beside 4
bytes that count its steps; of LLaMA 7B in bfloat16 by `state_bytes()`. Where there is a figure for `fallback`, the
optimizer is for the matrices of attention and MLP, and embedding, head and norms take a fallback, AdamW by default.

*Of a gradient it needs*: where *some rows* suffice, `train.execution: fused` never holds the gradients of head and
embedding, the largest ones, whole; `project` keeps *its projection* alone, over micro-batches and to the end of the
step ([how a step is made](../execution.md)). *As `fallback`, `head`*: every optimizer may stand there; *yes* is for
those that take an embedding's gradient by rows, the others were made for the matrices of layers."""


def optimizer_index() -> str:
    """The page, with what is written by hand in it."""
    lines = [
        "# The optimizers",
        "",
        "Each has a page: when to use it, its equations, settings, bytes and known limits.",
        "",
        *hand_written(INDEX, ("Which one?",)),
        "",
        "## All of them",
        "",
        *table(HEAD, [index_row(name) for name in OPTIMIZERS]),
        "",
        *LEGEND.split("\n"),
        "",
        *storage_section(),
        "",
        "Made by `make docs`, but for what stands between the markers.",
        "",
    ]
    return "\n".join(lines)


def index_row(name: str) -> tuple[str, ...]:
    owner = optimizer_class(name)
    needed = gradient_needed(name)
    return (
        f"[{name}]({name}.md)",
        state_values(name) + (", in its turn" if owner.rests else ""),
        in_unit(state_bytes("7B", name, {}), GIB),
        in_unit(state_bytes("7B", name, SMALL_FALLBACK), GIB) if owner.treats_matrices else "",
        needed + (", in its turn" if owner.rests else ""),
        "yes" if rule_and_settings(name)[0].is_projected else "no",
        "yes" if needed == "some rows" and not owner.rests else "not made for it",
        source(name),
    )


def source(name: str) -> str:
    """The first paper that the documentation names as the source."""
    text = (inspect.getdoc(optimizer_class(name)) or "").partition("Source:")[2]
    found = re.search(r"arXiv:\d{4}\.\d{5}", text)
    return linked(found.group()) if found else ""
