"""Train a small LLaMA, a pretrained and a new one, with every optimizer at its best learning rate, over several seeds.

    python scripts/compare_optimizers.py --data FOLDER [--tasks stories gsm8k] [--methods adamw galore] [--seeds 3]

FOLDER holds the model and the texts (stories260k, stories, gsm8k, wikitext-2). Results are kept in --out as they come;
the same command goes on where it was stopped, and more tasks, methods or seeds may be added. Writes
optimizer_comparison.json, .md and .png.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from optimizer_comparison.methods import METHODS, method
from optimizer_comparison.picture import draw
from optimizer_comparison.results import markdown, summaries
from optimizer_comparison.runs import Runs, best_learning_rate, train_once
from optimizer_comparison.tasks import TASKS, task

ROOT = Path(__file__).parent.parent
FILE = "optimizer_comparison"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LOWMEM_TEST_DATA"))
    parser.add_argument("--tasks", nargs="+", default=["stories"], choices=[each.name for each in TASKS])
    names = [each.name for each in METHODS]
    parser.add_argument(
        "--methods", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=256, help="longest row")
    parser.add_argument("--eval-batches", type=int, default=8, help="batches of 32 held-out rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the folder of the model and the texts with --data, or in LOWMEM_TEST_DATA")

    work = {name: getattr(arguments, name) for name in ("steps", "rows", "tokens", "eval_batches")}
    runs = Runs(arguments.out / f"{FILE}.json", work)
    for chosen in map(task, arguments.tasks):
        for each in map(method, arguments.methods):

            def loss_at(lr: float, seed: int = 0, chosen=chosen, each=each) -> float:
                make = partial(train_once, chosen, each, lr, seed, Path(arguments.data), work)
                return runs.result(chosen, each, lr, seed, make)["loss"]

            best = best_learning_rate(loss_at, each.grid)
            for seed in range(1, arguments.seeds):
                loss_at(best, seed)
    conditions = {
        "model": "stories260k, pretraining: a new LLaMA of 1.1 million parameters; float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    text = markdown(runs.content, conditions)
    (arguments.out / f"{FILE}.md").write_text(text, encoding="utf-8")
    draw(summaries(runs.content), arguments.out / f"{FILE}.png")
    print(text)


if __name__ == "__main__":
    main()
