"""A run that stopped and continued against one that did not."""

from __future__ import annotations

import json
import random
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from lowmem.hf.trainer import LowMemTrainer
from tests.hf.tiny_runs import tiny_recipe, write_model

STEPS = 7
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.per_device_batch_size=4",
    "train.gradient_accumulation_steps=2",  # 40 rows: an epoch has five steps
    "save.every=1",
    "save.keep=100",
    "save.optimizer_states=all",
    "eval.every=2",
    "report.log_every=1",
)

LOW_BIT = (
    "optimizer.storage={moment: int8, variance: int8, basis: int4}",
    "optimizer.fallback={name: adamw, storage: {moment: int8, variance: int8}}",
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def rows_without_times(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {"seconds", "tokens_per_second", "peak_allocated_bytes"}
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def assert_equal_checkpoints(one, other):
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (one / name).exists():
            left, right = load_file(one / name), load_file(other / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
    left, right = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other))
    assert left["param_groups"] == right["param_groups"]
    for index, state in left["state"].items():
        for name, value in state.items():
            assert value.dtype == right["state"][index][name].dtype
            assert torch.equal(value, right["state"][index][name])


def cut_back(run, step):
    """Leave of `run` what a process that was killed after `step` would have left, but for later rows."""
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "model", ignore_errors=True)
    (run / "memory.json").unlink()


@pytest.mark.parametrize(
    "settings",
    [
        ("model.dtype=float32",),
        ("model.dtype=bfloat16",),
        ("lora.r=2", "lora.dropout=0.3", "train.activation_checkpointing=true"),
        ("model.dtype=bfloat16", *LOW_BIT),
        ("data.packing=true", "data.max_length=32", "train.per_device_batch_size=2"),
    ],
    ids=["float32", "bfloat16", "lora_with_dropout", "state_in_few_bits", "packed_rows"],
)
def test_resumed_run_equals_uninterrupted_run_bit_by_bit(tmp_path, model_folder, settings):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS, *settings)
    assert train(recipe) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(run, whole)
    for step in (5, 3):  # at the border of an epoch, and inside one
        cut_back(run, step)
        assert train(recipe) == 0
        assert_equal_checkpoints(run / f"checkpoint-{STEPS}", whole / f"checkpoint-{STEPS}")
        assert rows_without_times(run) == rows_without_times(whole), "no row is repeated, none is lost"


def test_every_random_generator_goes_on_where_it_was(tmp_path, model_folder, monkeypatch):
    real, drawn = LowMemTrainer.training_step, {}

    def training_step(self, *args):
        numbers = (random.random(), numpy.random.rand(), torch.rand(()).item())
        drawn.setdefault(self.state.global_step, []).append(numbers)
        return real(self, *args)

    monkeypatch.setattr(LowMemTrainer, "training_step", training_step)
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    assert train(recipe) == 0
    whole = dict(drawn)
    cut_back(tmp_path / "run", 3)
    drawn.clear()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(99)
    assert train(recipe) == 0
    assert drawn == {step: numbers for step, numbers in whole.items() if step >= 3}
    assert len({number for step in whole.values() for numbers in step for number in numbers}) == 6 * STEPS


def test_a_run_continues_from_a_named_checkpoint_of_another_folder(tmp_path, model_folder):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    assert train(recipe) == 0
    source = tmp_path / "run" / "checkpoint-3"
    other = tiny_recipe(
        tmp_path, model_folder, *SETTINGS, f"save.dir={tmp_path / 'other'}", f"resume={source}"
    )
    assert train(other) == 0
    assert_equal_checkpoints(tmp_path / "run" / "checkpoint-7", tmp_path / "other" / "checkpoint-7")


def test_a_finished_run_only_finishes_again_and_more_steps_continue_it(tmp_path, model_folder):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS, "train.lr_scheduler.name=constant")
    assert train(recipe) == 0
    before = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    assert train(recipe) == 0, "an interrupt after the last step leaves this"
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    longer = tiny_recipe(
        tmp_path, model_folder, *SETTINGS, "train.lr_scheduler.name=constant", "train.max_steps=9"
    )
    assert train(longer) == 0
    steps = [row["step"] for row in rows_without_times(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 10))
