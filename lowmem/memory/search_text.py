"""What fits a card, as a table of 80 columns and as JSON values."""

from __future__ import annotations

import textwrap
from typing import Any

from lowmem.memory.cards import Card
from lowmem.memory.search import LENGTHS, Found
from lowmem.memory.wording import BASELINE_NAMES, size

WIDTH = 80


def search_document(found: list[Found], card: Card, conditions: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "formula",
        "gpu": card.name,
        "gpu_bytes": card.memory_bytes,
        "methods": [vars(one) for one in found],
        "conditions": conditions,
    }


def search_text(document: dict[str, Any]) -> str:
    """Methods that fit, each with its longest row and its largest batches; then those that do not fit at all."""
    head = f"{'':<24}{'checkpointed':<14}{'longest row':>11}"
    head += "".join(f"{f'x {length}':>9}" for length in LENGTHS)
    lines = [head, "-" * len(head)]
    fitting = [one for one in document["methods"] if one["longest"]]
    for one in fitting:
        batches = "".join(f"{one['batches'][length] or '-':>9}" for length in LENGTHS)
        checkpointed = "yes" if one["activation_checkpointing"] else "no"
        lines.append(f"{_name(one):<24}{checkpointed:<14}{one['longest']:>11,}{batches}")
    without = sorted({_name(one) for one in document["methods"]} - {_name(one) for one in fitting})
    at = document["conditions"]
    notes = [
        f"Fits {document['gpu']} ({size(document['gpu_bytes'])}): {at['model']}, {at['dtype']}, chunked loss, no "
        "accumulation. The longest row is in tokens at batch 1; the other columns are the most rows of that length.",
        "lowmem's optimizers use and free each gradient as it arrives (train.execution: auto takes fused), which "
        "needs optimizer.clip: tensor or train.max_grad_norm: null.",
        f"Does not fit at any length: {', '.join(without)}." if without else "",
        "By formula; lowmem plan without --search simulates one recipe operator by operator.",
    ]
    return "\n".join([*lines, "", *(line for note in notes for line in textwrap.wrap(note, WIDTH))])


def _name(one: dict[str, Any]) -> str:
    return BASELINE_NAMES.get(one["method"], one["method"])
