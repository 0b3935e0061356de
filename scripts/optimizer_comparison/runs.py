"""Train once, and search a learning rate: every result is kept, so that a search goes on where it was stopped."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import lowmem.hf.setup
from lowmem.data.prepare import prepare
from lowmem.hf.flow import train
from lowmem.recipe.load import load_recipe
from optimizer_comparison.methods import Method
from optimizer_comparison.tasks import Task

ROOT = Path(__file__).parent.parent.parent
MOST_EXTENSIONS = 5
Run = dict[str, Any]


class Runs:
    """Results by task, method, learning rate and seed, in a file that is rewritten after each."""

    def __init__(self, path: Path, work: dict[str, Any]):
        self._path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        if known and known["work"] != work:
            raise SystemExit(f"{path} holds results of other work: {known['work']}. Name another --out.")
        self.content: dict[str, Any] = known or {"work": work, "runs": []}

    def result(self, task: Task, method: Method, lr: float, seed: int, make: Callable[[], Run]) -> Run:
        key = {
            "task": task.name,
            "method": method.name,
            "settings": list(method.settings),
            "lr": lr,
            "seed": seed,
        }
        for run in self.content["runs"]:
            if {name: run[name] for name in key} == key:
                return run
        run = key | make()
        self.content["runs"].append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        print(f"{task.name} {method.name} lr {lr:g} seed {seed}: {run['loss']:.4f}", flush=True)
        return run


def best_learning_rate(loss_at: Callable[[float], float], grid: tuple[float, ...]) -> float:
    """The best of `grid`, which is extended by factors of 2 until its best value lies inside."""
    losses = {lr: loss_at(lr) for lr in grid}
    for _ in range(MOST_EXTENSIONS):
        best = min(losses, key=losses.__getitem__)
        if best == max(losses):
            losses[2 * best] = loss_at(2 * best)
        elif best == min(losses):
            losses[best / 2] = loss_at(best / 2)
        else:
            break
    return min(losses, key=losses.__getitem__)


class KeptRows:
    """Rows of a recipe's `data` are turned into tokens once, and `seconds` is what that has cost in this run."""

    _known: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.seconds = 0.0

    def prepare(self, source: Any, data: Any, tokenizer: Any, *, seed: int, where: str) -> Any:
        begin = time.process_time()
        key = repr((source, data, tokenizer.name_or_path, seed, where))
        if key not in self._known:
            self._known[key] = prepare(source, data, tokenizer, seed=seed, where=where)
        self.seconds += time.process_time() - begin
        return self._known[key]


def train_once(task: Task, method: Method, lr: float, seed: int, data: Path, work: dict[str, Any]) -> Run:
    """Held-out loss in nats a token, bytes of optimizer state and of weights, CPU seconds without reading the rows."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            *task.overrides(data, work["tokens"], seed),
            "optimizer.fallback=null",
            f"optimizer.lr={lr}",
            *method.settings,
            f"train.seed={seed}",
            f"train.max_steps={work['steps'] * task.times_the_steps}",
            f"train.per_device_batch_size={work['rows']}",
            "eval={loss_only: true, at_start: false, batch_size: 32}",
            f"eval.max_batches={work['eval_batches']}",
            "report={baseline: none, plan: false, log_every: 1000}",
            "save={model: false, probe_at_start: false}",
            f"save.dir={folder}",
        ]
        rows = KeptRows()
        begin = time.process_time()
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(lowmem.hf.setup, "prepare", rows.prepare),
        ):
            train(load_recipe(ROOT / "recipes" / "quickstart.yaml", changes))
        seconds = time.process_time() - begin - rows.seconds
        metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        parts = json.loads((Path(folder) / "memory.json").read_text())["parts"]
        loss = [row["eval_loss"] for row in metrics if "eval_loss" in row][-1]
    return {
        "loss": loss if loss is not None and math.isfinite(loss) else math.inf,
        "state_bytes": parts["optimizer_state"],
        "weight_bytes": parts["weights"],
        "cpu_seconds": round(seconds, 1),
    }
