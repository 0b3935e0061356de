"""A recipe over two processes that divide the model, by the command and the files that a user has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.prefix, "deepspeed")
"""Beside the environment and not in it: Accelerate imports it everywhere it finds it."""

# A rule for matrices, and for the rest a large eps: what differs is then sums of gradients, not signs of the smallest.
OPTIMIZER = "optimizer={name: sinkgd, lr: 1.0e-2, clip: full, fallback: {name: adamw, eps: 1.0e-3}}"
SETTINGS = (
    OPTIMIZER,
    "train.max_steps=4",
    "train.max_grad_norm=0.5",
    "train.gradient_accumulation_steps=2",
    "save.every=2",
    "save.optimizer_states=all",
    "eval.every=2",
    "report.log_every=1",
)

with_deepspeed = pytest.mark.skipif(
    not DEEPSPEED.is_dir(), reason="needs DeepSpeed beside the environment: make test puts it there"
)
STRATEGIES = [
    "fsdp2",
    pytest.param("zero3", marks=with_deepspeed),
    *(pytest.param(name, marks=[with_deepspeed, pytest.mark.slow]) for name in ("zero1", "zero2")),
    pytest.param("ddp", marks=pytest.mark.slow),
]


def launched(strategy: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{strategy}.yaml")]
    path = os.pathsep.join([str(ROOT), str(DEEPSPEED), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, "-m", "lowmem.train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_the_weights_of_one_and_go_on_with_the_same_bits(tmp_path, monkeypatch, strategy):
    model = write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    done = launched(strategy, str(recipe), *SETTINGS, "train.per_device_batch_size=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("data.train:") == 1, "one process speaks"

    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    single = tiny_recipe(
        tmp_path, model, *SETTINGS, "train.per_device_batch_size=4", f"save.dir={tmp_path / 'single'}"
    )
    assert train(single) == 0
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("single", "run"))
    start = load_file(model / "model.safetensors")
    assert one.keys() == two.keys()
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3 * moved
    for left, right in zip(rows_of(tmp_path / "single"), rows_of(tmp_path / "run"), strict=True):
        assert left["step"] == right["step"]
        for name in ("loss", "eval_loss", "tokens", "lr", "full_grad_norm"):
            if left.get(name) is not None and right.get(name) is not None:
                assert left[name] == pytest.approx(right[name], rel=1e-4)

    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", again / "checkpoint-2")
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    (again / "recipe.yaml").write_text(text.replace(str(tmp_path / "run"), str(again)))
    resumed = launched(strategy, str(recipe), *SETTINGS, "train.per_device_batch_size=2", f"save.dir={again}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "continuing from step 2" in resumed.stdout
    end = load_file(again / "model" / "model.safetensors")
    assert all(torch.equal(end[name], two[name]) for name in two)
