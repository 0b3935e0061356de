"""Two processes of a launcher against one process that does the same work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.errors import RefusedError
from lowmem.hf.flow import train
from lowmem.hf.training_arguments import training_arguments
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def launched(recipe_file, *overrides):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "lowmem.train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(recipe_file), *overrides], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_and_speak_once(tmp_path, model_folder, monkeypatch):
    settings = (
        "train.gradient_accumulation_steps=2",
        "train.max_steps=6",
        "eval.at_start=true",
        "eval.loss_only=false",
    )
    settings += ("save.every=3", "eval.max_new_tokens=4", "report.baseline=adamw")
    recipe_file = write_recipe(tmp_path, model_folder)
    both = launched(recipe_file, *settings, "train.per_device_batch_size=2")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("data.train:") == 1
    assert both.stdout.count("AdamW fused") >= 1
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    single = tiny_recipe(
        tmp_path,
        model_folder,
        *settings[:-1],
        "train.per_device_batch_size=4",
        f"save.dir={tmp_path / 'single'}",
    )
    assert train(single) == 0

    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("single", "run"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("single", "run")
    ]
    assert len(rows[0]) == len(rows[1])
    for left, right in zip(*rows, strict=True):
        assert left["step"] == right["step"]
        for name in ("loss", "eval_loss", "exact_match", "tokens", "lr"):
            assert (name in left) == (name in right)
            assert left.get(name, 0.0) == pytest.approx(right.get(name, 0.0), rel=1e-4)
    assert json.loads((tmp_path / "run" / "memory.json").read_text())["conditions"]["world_size"] == 2

    again = launched(recipe_file, *settings, "train.per_device_batch_size=2", "train.seed=9")
    assert again.returncode != 0
    assert len(re.findall("train.seed: 0 there, 9 in this recipe", again.stderr)) == 1


def test_a_launch_whose_processes_did_not_find_each_other_is_refused(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", torch.device("cpu"))
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 0))
    with pytest.raises(RefusedError, match="started 4 processes, but accelerate joined 1"):
        training_arguments(tiny_recipe(tmp_path, model_folder), tmp_path)
