"""Which settings fit which small card: docs/results/smallest_cards.json and .md, simulated by `lowmem plan`.

    python scripts/make_smallest_cards.py [--only 7b] [--out docs/results]

Every parameter is trained, every refresh included. Only configurations are needed; no weights, no GPU. A row that
others have published a figure for says so, with its source.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from model_shapes import MODELS

import lowmem
from lowmem.memory.cards import card, fits

ROOT = Path(__file__).parent.parent
GIB = 2**30

WORK = (
    "model.dtype=bfloat16", "data.packing=false", "train.activation_checkpointing=true", "train.max_grad_norm=null",
)  # fmt: skip
INT8 = ("model.weights=int8",)
ALL_INT8 = ("model.weights=int8", "model.int8={embeddings: true}")
FACTORED = "fallback: {name: adafactor}"


@dataclass(frozen=True)
class Row:
    """One setting. `card`: the smallest card it is for; `others`: a published figure for the same work."""

    name: str
    model: str
    optimizer: str
    batch: int
    tokens: int
    card: str
    weights: tuple[str, ...] = INT8
    micro_batches: int = 1
    also: tuple[str, ...] = ()
    others: str = ""

    def overrides(self) -> list[str]:
        return [
            *WORK,
            *self.weights,
            f"optimizer={{lr: 1.0e-4, {self.optimizer}}}",
            f"data.max_length={self.tokens}",
            f"train.per_device_batch_size={self.batch}",
            f"train.gradient_accumulation_steps={self.micro_batches}",
            *self.also,
        ]


ALSO = {
    "train.activation_offload=true": ", activations on the host",
    "train.execution=project": ", gradients projected and kept",
}
"""What a row's other overrides are called in the table."""

Q_GALORE = "name: q_galore, accumulator: bf16, " + FACTORED
# fmt: off
ROWS = (
    Row("7b-q1024", "LLaMA-2-7B", f"{Q_GALORE}, rank: 1024", 16, 256, "16GiB",
        others="15.26 GB, embeddings not trained (README of VITA-Group/Q-GaLore)"),
    Row("7b-q1024-offload", "LLaMA-2-7B", f"{Q_GALORE}, rank: 1024", 16, 256, "12GiB",
        also=("train.activation_offload=true",)),
    Row("7b-q1024-accumulated", "LLaMA-2-7B", f"{Q_GALORE}, rank: 1024", 4, 256, "16GiB", micro_batches=4),
    Row("7b-q256", "LLaMA-2-7B", f"{Q_GALORE}, rank: 256", 1, 1024, "12GiB"),
    Row("7b-q256-project", "LLaMA-2-7B", f"{Q_GALORE}, rank: 256", 1, 1024, "12GiB",
        also=("train.execution=project",)),
    Row("7b-q256-accumulated", "LLaMA-2-7B", f"{Q_GALORE}, rank: 256", 1, 1024, "12GiB", micro_batches=16),
    Row("7b-sinkgd", "LLaMA-2-7B", f"name: sinkgd, {FACTORED}", 1, 512, "8GiB"),
    Row("7b-adafactor", "LLaMA-2-7B", "name: adafactor", 1, 512, "8GiB"),
    Row("7b-sinkgd-all-int8", "LLaMA-2-7B", f"name: sinkgd, {FACTORED}", 1, 512, "8GiB", weights=ALL_INT8),
    Row("7b-adafactor-all-int8", "LLaMA-2-7B", "name: adafactor", 1, 512, "8GiB", weights=ALL_INT8),
    Row("13b-sinkgd", "LLaMA-2-13B", f"name: sinkgd, {FACTORED}", 1, 512, "16GiB"),
    Row("13b-sinkgd-all-int8", "LLaMA-2-13B", f"name: sinkgd, {FACTORED}", 1, 512, "16GiB", weights=ALL_INT8),
    Row("70b-sinkgd", "LLaMA-2-70B", f"name: sinkgd, {FACTORED}", 1, 512, "80GiB"),
    Row("70b-sinkgd-all-int8", "LLaMA-2-70B", f"name: sinkgd, {FACTORED}", 1, 512, "80GiB", weights=ALL_INT8),
    Row("8b-q256", "Llama-3.1-8B", f"{Q_GALORE}, rank: 256", 2, 2048, "16GiB",
        others="18.9 GiB on an RTX 4090 with torchtune's single-device full fine-tuning (torchtune README)"),
    Row("8b-sinkgd", "Llama-3.1-8B", f"name: sinkgd, {FACTORED}", 1, 512, "10GiB"),
    Row("1b-adafactor-bf16", "Llama-3.2-1B", "name: adafactor", 1, 512, "4GiB", weights=()),
    Row("1b-adafactor-int8", "Llama-3.2-1B", "name: adafactor", 1, 512, "4GiB", weights=ALL_INT8),
    Row("1b-sinkgd-int8", "Llama-3.2-1B", f"name: sinkgd, {FACTORED}", 1, 512, "4GiB", weights=ALL_INT8),
)
# fmt: on


def planned(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[row.model]), encoding="utf-8")
        overrides = [f"model.name_or_path={folder}", *row.overrides()]
        found = lowmem.plan("llama32_1b_galore", overrides, gpu=row.card)
    moment = max(found.moments, key=lambda each: each["peak_bytes"])
    return {
        "name": row.name,
        "model": row.model,
        "settings": row.overrides(),
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "parts": found.parts,
        "fullest_moment": moment,
        "card": row.card,
        "fits": fits(found.reserved_bytes, card(row.card).memory_bytes),
        "others": row.others,
    }


def weights_of(row: Row) -> str:
    if row.weights == ALL_INT8:
        return "int8, embedding and head too"
    return "int8" if row.weights else "bfloat16"


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# The smallest cards",
        "",
        "Made by `scripts/make_smallest_cards.py`: simulated by `lowmem plan`, no GPU was used. Every parameter is",
        "trained; refreshes of bases are included. Activation checkpointing, chunked loss, no clipping. *fits*:",
        "reserved bytes and 0.6 GiB of CUDA context within 97 % of the card.",
        "",
        "| model | optimizer | weights | tokens a step | peak GiB | reserved GiB | card | published elsewhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {entry["name"]: entry for entry in document["rows"]}
    for row in ROWS:
        if row.name not in found:
            continue
        entry = found[row.name]
        tokens = " x ".join(str(n) for n in (row.micro_batches, row.batch, row.tokens) if n > 1)
        optimizer = row.optimizer.replace("name: ", "").replace("accumulator: bf16, ", "")
        also = "".join(ALSO[each] for each in row.also)
        verdict = f"{row.card.removesuffix('GiB')} GiB: {'fits' if entry['fits'] else 'does not fit'}"
        lines.append(
            f"| {row.model} | {optimizer}{also} | {weights_of(row)} | {tokens} | {entry['peak_bytes'] / GIB:.2f} | "
            f"{entry['reserved_bytes'] / GIB:.2f} | {verdict} | {row.others} |"
        )
    return "\n".join([*lines, "", "Conditions: " + json.dumps(document["conditions"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name begins so")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()

    path = arguments.out / "smallest_cards.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {entry["name"]: entry for entry in kept if entry["name"] in {row.name for row in ROWS}}
    conditions = {"source": "simulated", "torch": torch.__version__, "transformers": transformers.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if not row.name.startswith(tuple(arguments.only)):
            continue
        rows[row.name] = planned(row)
        print(f"{row.name:24s} {rows[row.name]['peak_bytes'] / GIB:7.2f} GiB", flush=True)
        document = {"rows": [rows[each.name] for each in ROWS if each.name in rows], "conditions": conditions}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "smallest_cards.md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
