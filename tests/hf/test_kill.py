"""A run that is killed and started again, over and over, against one that nobody touched.

One long-lived process imports everything once and forks a child for each run, so that a kill point costs
what the run costs. `python -m tests.hf.test_kill FOLDER MODEL COUNT SEED OPTIMIZER/EXECUTION[/IN] ...` is that process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from lowmem.hf.trainer import LowMemTrainer
from lowmem.optim import LowMemOptimizer
from lowmem.recipe.schema import Recipe
from lowmem.run.choose import EXECUTIONS
from tests.hf.every_way import every_way, settings_for
from tests.hf.tiny_runs import tiny_recipe, write_model

SETTINGS = (
    "train.max_steps=7",
    "train.gradient_accumulation_steps=2",
    "train.per_device_batch_size=2",
    "save.every=2",
    "report.log_every=3",  # a checkpoint lies inside an interval
    "eval.every=4",
)
IN = {
    "low_bit": (
        "optimizer.storage={moment: int8, variance: int8, basis: int4}",
        "optimizer.fallback={name: adamw, storage: {moment: int8, variance: int8}}",
    ),
    "int8_weights": ("model.weights=int8", "model.int8.group_size=16", "model.dtype=bfloat16"),
}
CALLS = ("fsync", "rename", "replace", "write", "open", "unlink", "rmdir", "mkdir")
MEASURED = {"seconds", "tokens_per_second", "peak_allocated_bytes"}


def kill_at_(event: int) -> list[int]:
    """Make this process kill itself at its `event`-th system call that changes the folder, or in a step.

    Returns a list that counts the events. A write is cut in two first.
    """
    count = [0]

    def tick() -> bool:
        count[0] += 1
        return count[0] == event

    def watched(real):
        def call(*args, **kwargs):
            if tick():
                if real.__name__ == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    for name in ("step_param", "project_grad_", "accumulate_grad_"):
        setattr(LowMemOptimizer, name, watched(getattr(LowMemOptimizer, name)))
    for owner, name in ((LowMemTrainer, "training_step"), (torch, "save")):
        setattr(owner, name, watched(getattr(owner, name)))
    return count


def in_a_child(work) -> tuple[int, float]:
    """Exit status of `work()` in a forked process, as waitpid gives it, and its seconds."""
    begin = time.monotonic()
    child = start_child(work)
    return os.waitpid(child, 0)[1], time.monotonic() - begin


def start_child(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os._exit(work())
    except BaseException as error:
        sys.__stderr__.write(f"{type(error).__name__}: {error}\n")
        sys.__stderr__.flush()
        os._exit(99)


def outcome_of(run: Path) -> dict:
    """What a run leaves that must not depend on how often it was killed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = run / "checkpoint-7"
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    return {
        # What the steps of a killed process took is not known to the one that only writes the model.
        "names": {path.name for path in run.iterdir()} - {"memory.json"},
        "rows": [{name: value for name, value in row.items() if name not in MEASURED} for row in rows],
        "model": load_file(run / "model" / "model.safetensors"),
        "checkpoint": load_file(newest / "model.safetensors"),
        "state": {f"{i}.{name}": value for i, one in state["state"].items() for name, value in one.items()},
        "groups": state["param_groups"],
    }


def differences(found: dict, expected: dict) -> list[str]:
    lines = [f"{part} differ" for part in ("rows", "groups") if found[part] != expected[part]]
    lines += [f"only one has {name}" for name in sorted(found["names"] ^ expected["names"])]
    for part in ("model", "checkpoint", "state"):
        if found[part].keys() != expected[part].keys():
            lines.append(f"{part} has other names")
            continue
        unequal = [
            name for name, value in expected[part].items() if not torch.equal(value, found[part][name])
        ]
        if unequal:
            lines.append(f"{part} differs in {unequal[0]}")
    return lines


def recipe_for(folder: Path, model: Path, way: str) -> Recipe:
    name, execution, *stored = way.split("/")
    settings = ", ".join(f"{key}: {value}" for key, value in settings_for(name).items())
    clipping = ["train.max_grad_norm=null"] if execution == "fused" else []
    return tiny_recipe(
        folder,
        model,
        *SETTINGS,
        *clipping,
        f"optimizer={{name: {name}, {settings}}}",
        f"train.execution={execution}",
        *(override for what in stored for override in IN[what]),
    )


def prove(folder: Path, model: Path, count: int, seed: int, ways: list[str]) -> None:
    """Kill `count` runs at random, restart each until it is done, and print one JSON line for each."""
    draw = random.Random(seed)
    lowmem.hf.ending.write_report = lambda where: where / "report.md"  # pictures take longer than these runs
    recipes = {way: recipe_for(folder, model, way) for way in ways}
    run = folder / "run"
    expected, events, seconds = {}, {}, {}
    for way, recipe in recipes.items():

        def counted(recipe=recipe) -> int:
            count = kill_at_(0)
            code = train(recipe)
            (folder / "events").write_text(str(count[0]))
            return code

        status, seconds[way] = in_a_child(counted)
        assert status == 0
        events[way] = int((folder / "events").read_text())
        expected[way] = outcome_of(run)
        shutil.rmtree(run)
    for number in range(count):
        way = ways[number % len(ways)]
        recipe, kills = recipes[way], []
        for _ in range(1 + number % 2):  # every other run is killed again while it recovers
            if draw.random() < 0.7:
                event = draw.randint(1, events[way])
                status, _ = in_a_child(lambda recipe=recipe, event=event: (kill_at_(event), train(recipe))[1])
                kills.append(f"event {event}")
            else:
                wait_seconds = draw.uniform(0, seconds[way])
                child = start_child(lambda recipe=recipe: train(recipe))
                time.sleep(wait_seconds)
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                kills.append(f"{wait_seconds:.3f} s")
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed or status == 0, f"{way}, {kills}: {status}"
        status, _ = in_a_child(lambda recipe=recipe: train(recipe))
        wrong = [f"exit status {status}"] if status else differences(outcome_of(run), expected[way])
        print(json.dumps({"way": way, "kills": kills, "wrong": wrong}), file=sys.__stdout__, flush=True)
        shutil.rmtree(run)


def lines_of(tmp_path: Path, count: int, seed: int, ways: list[str]) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "tests.hf.test_kill",
        str(tmp_path),
        str(write_model(tmp_path / "model")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(count), str(seed), *ways],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_runs_killed_at_random_points_end_as_if_they_had_not_been(tmp_path):
    ways = ["galore/project", "adamw/plain", "sgd_sai/fused", "galore/fused"]
    lines = lines_of(tmp_path, 4, seed=1, ways=ways)
    assert [line["way"] for line in lines] == ways
    assert [line for line in lines if line["wrong"]] == []


@pytest.mark.slow
def test_runs_of_every_optimizer_and_execution_killed_at_random_points_end_as_if_they_had_not_been(tmp_path):
    ways = ["/".join(way) for way in every_way()]
    ways += [f"galore/{execution}/{what}" for execution in EXECUTIONS for what in IN]
    lines = lines_of(tmp_path, max(104, 4 * len(ways)), seed=2, ways=ways)
    assert len(lines) >= 100
    assert {line["way"] for line in lines} == set(ways)
    assert [line for line in lines if line["wrong"]] == []


if __name__ == "__main__":
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what the runs say; forked children share it
    where, model_folder, how_many, first_seed, *ways_given = sys.argv[1:]
    prove(Path(where), Path(model_folder), int(how_many), int(first_seed), ways_given)
