"""Which method lets which card fine-tune which model: docs/images/what_fits.png and docs/results/what_fits.json.

    python scripts/make_fit_picture.py

By formula (lowmem plan --formula): one row of 1024 tokens a step, activation checkpointing, chunked loss, bfloat16;
ours clip each gradient by itself, so that it can be used and freed inside backward. A method is placed at the memory
that a card must have: what the allocator reserves and the CUDA context, over 0.97.
"""

from __future__ import annotations

import json
from pathlib import Path

from model_shapes import MODELS

from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import CONTEXT_BYTES, USABLE
from lowmem.memory.estimate import Estimate, estimate, estimate_baseline
from lowmem.memory.plots import INK, QUIET, figure
from lowmem.memory.wording import BASELINE_NAMES
from lowmem.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)
WORK = [
    "model.dtype=bfloat16", "data.packing=false", "data.max_length=1024", "train.per_device_batch_size=1",
    "train.gradient_accumulation_steps=1", "train.activation_checkpointing=true",
]  # fmt: skip
OURS = {
    "GaLore r=256": "optimizer={name: galore, lr: 1.0e-4, rank: 256, clip: tensor}",
    "SGD-SaI": "optimizer={name: sgd_sai, lr: 1.0e-4, clip: tensor}",
    "SGD": "optimizer={name: sgd, lr: 1.0e-4, clip: tensor}",
}
THEIRS = ("adamw_fp32_master", "adamw_fused", "bitsandbytes_adamw8bit", "lora_r16", "qlora_r16")
LOOKS = {
    "AdamW, fp32 master": ("#999999", "X"), "AdamW fused": ("#D55E00", "o"), "AdamW 8-bit": ("#E69F00", "o"),
    "GaLore r=256": ("#0072B2", "D"), "SGD-SaI": ("#56B4E9", "D"), "SGD": ("#009E73", "D"),
    "LoRA r=16": ("#CC79A7", "v"), "QLoRA r=16": ("#777777", "v"),
}  # fmt: skip


def card_bytes(found: Estimate) -> int:
    """The smallest card that holds it."""
    return int((found.reserved_bytes + CONTEXT_BYTES) / USABLE)


def needed() -> dict[str, dict[str, int]]:
    """Model -> method -> bytes of the smallest card."""
    table: dict[str, dict[str, int]] = {}
    for model, config in MODELS.items():
        architecture = Architecture.from_config(config)
        plain = load_recipe("llama32_1b_galore", WORK, files_must_exist=False)
        row = {
            BASELINE_NAMES[name]: card_bytes(estimate_baseline(name, plain, architecture)) for name in THEIRS
        }
        for name, override in OURS.items():
            recipe = load_recipe("llama32_1b_galore", [*WORK, override], files_must_exist=False)
            row[name] = card_bytes(estimate(recipe, architecture))
        table[model] = {name: row[name] for name in LOOKS if name in row}
    return table


def draw(table: dict[str, dict[str, int]], path: Path) -> None:
    with figure(path, height=5.2) as axes:
        for card in CARDS:
            axes.axvline(card, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        for row, methods in enumerate(table.values()):
            for name, nbytes in methods.items():
                colour, marker = LOOKS[name]
                label = name if row == 0 else None
                height = row - 0.13 if name in OURS else row + 0.13
                axes.plot(
                    nbytes / GIB, height, marker, color=colour, markersize=8, label=label, alpha=0.9,
                    linestyle="none", markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(1.6, 1300)
        axes.set_xticks(CARDS, [f"{card}" for card in CARDS])
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(len(table)), list(table), fontsize=10)
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.set_xlabel("card needed, GiB (log scale; the lines are cards on sale)", color=INK)
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8.5)
        axes.set_title(
            "Left of a line: that card trains the model (above: lowmem's, below: others)",
            loc="left",
            fontsize=11.5,
            fontweight="bold",
            color=INK,
            pad=44,
        )


def main() -> None:
    table = needed()
    conditions = {"work": WORK, "ours": OURS, "cards_gib": CARDS, "source": "formula"}
    out = ROOT / "docs" / "results" / "what_fits.json"
    out.write_text(
        json.dumps({"card_bytes": table, "conditions": conditions}, indent=2) + "\n", encoding="utf-8"
    )
    draw(table, ROOT / "docs" / "images" / "what_fits.png")
    for model, methods in table.items():
        print(f"{model:<14}" + "  ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in methods.items()))


if __name__ == "__main__":
    main()
