"""Fine-tune one small pretrained LLaMA with several optimizers over a grid of learning rates.

    python scripts/compare_learning_rates.py --model FOLDER --data child.jsonl.gz [--out docs/results]

The same rows, order, length and schedule for every run; only the optimizer and its learning rate differ.
Writes learning_rates.json and learning_rates.md: held-out loss for each, and each method's best against
AdamW's. A best value at the edge of its grid is marked: the grid should then be wider.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from lowmem.hf.flow import train
from lowmem.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
METHODS: dict[str, tuple[list[float], list[str]]] = {
    "adamw": ([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], []),
    "galore": (
        [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        ["optimizer.rank=32", "optimizer.refresh_every=50", "optimizer.on_refresh=rotate"],
    ),
}


def overrides(arguments: argparse.Namespace, folder: str) -> list[str]:
    """What every run has in common."""
    return [
        f"model.name_or_path={arguments.model}",
        f"data.train.path={arguments.data}",
        "data.train.format=prompt_response",
        "data.train.take=0.9",
        "data.template=plain",
        f"data.eval.path={arguments.data}",
        "data.eval.format=prompt_response",
        "data.eval.skip=0.9",
        "data.max_length=256",
        "optimizer.fallback=null",
        "eval.loss_only=true",
        "eval.at_start=false",
        "eval.every=null",
        "eval.max_batches=null",
        f"train.max_steps={arguments.steps}",
        "train.per_device_batch_size=16",
        "report.baseline=none",
        "save.model=false",
        f"save.dir={folder}",
    ]


def held_out_loss(folder: str) -> float:
    """The last evaluation in a run's metrics."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


def run(name: str, lr: float, arguments: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            *overrides(arguments, folder),
            f"optimizer.name={name}",
            f"optimizer.lr={lr}",
            *METHODS[name][1],
        ]
        train(load_recipe(ROOT / "recipes" / "quickstart.yaml", changes))
        return held_out_loss(folder)


def markdown(document: dict) -> str:
    """The document as a table."""
    lines = ["# Best learning rate of each method", "", document["what"], ""]
    lines += ["| method | learning rate: held-out loss | best | against AdamW |", "|---|---|---|---|"]
    for name, entry in document["methods"].items():
        losses = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in entry["losses"])
        edge = " (edge of the grid)" if entry["best_at_edge"] else ""
        best = f"{entry['best_loss']:.4f} at {entry['best_lr']:g}{edge}"
        lines.append(f"| {name} | {losses} | {best} | {entry['against_adamw']:+.2%} |")
    return "\n".join([*lines, "", "Conditions: " + json.dumps(document["conditions"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a small pretrained model")
    parser.add_argument("--data", required=True, help="prompt / response rows, JSONL, may be gzipped")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()

    methods = {}
    for name, (grid, _) in METHODS.items():
        losses = [(lr, run(name, lr, arguments)) for lr in grid]
        best_lr, best_loss = min(losses, key=lambda pair: pair[1])
        methods[name] = {
            "settings": METHODS[name][1],
            "losses": losses,
            "best_lr": best_lr,
            "best_loss": best_loss,
            "best_at_edge": best_lr in (grid[0], grid[-1]),
        }
    for entry in methods.values():
        entry["against_adamw"] = entry["best_loss"] / methods["adamw"]["best_loss"] - 1
    document = {
        "what": f"Held-out loss (nats per token) after {arguments.steps} steps of 16 x 256 tokens, cosine schedule.",
        "methods": methods,
        "conditions": {
            "model": Path(arguments.model).name,
            "data": Path(arguments.data).name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "learning_rates.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "learning_rates.md").write_text(markdown(document))
    print(markdown(document))


if __name__ == "__main__":
    main()
