"""What a run makes of a half-life in tokens, and what it says about accumulation."""

from __future__ import annotations

import pytest

from lowmem.hf.interrupt import Interrupt
from lowmem.hf.setup import prepare_run
from lowmem.hf.small_batches import remarks, tokens_of_a_step
from tests.hf.tiny_runs import tiny_recipe, write_model


def test_a_run_gets_the_beta2_of_the_tokens_of_its_steps(tmp_path, capsys):
    recipe = tiny_recipe(
        tmp_path,
        write_model(tmp_path / "model"),
        "optimizer={name: adamw, lr: 1.0e-3, beta2_half_life_tokens: 1000}",
        "train.per_device_batch_size=2",
        "train.gradient_accumulation_steps=3",
    )
    run = prepare_run(recipe, Interrupt())
    rows = run.trainer.train_dataset
    mean = sum(len(rows[index]["input_ids"]) for index in range(len(rows))) / len(rows)
    expected = 0.5 ** (6 * mean / 1000)
    assert len(run.trainer.optimizer.param_groups) == 2
    for group in run.trainer.optimizer.param_groups:
        assert group["betas"] == pytest.approx([0.9, expected])
    said = capsys.readouterr().out
    assert f"beta2 is {expected:.6g}" in said
    assert "gradient accumulation: 3 micro-batches a step on one device" in said
    assert "arXiv:2507.07101" in said


def test_nothing_is_said_about_accumulation_that_is_not_there_or_that_several_devices_share(tmp_path):
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), "train.gradient_accumulation_steps=2")
    assert len(remarks(recipe, 100, world_size=1)) == 1
    assert remarks(recipe, 100, world_size=2) == []
    single = tiny_recipe(tmp_path, tmp_path / "model", "train.gradient_accumulation_steps=1")
    assert remarks(single, 100, world_size=1) == []


def test_every_process_of_a_run_adds_to_the_tokens_of_a_step(tmp_path):
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), "train.per_device_batch_size=2")
    rows = {"tokens": 300, "sequences": 10}
    alone = tokens_of_a_step(recipe, rows, 1)
    assert alone == 2 * recipe.train.gradient_accumulation_steps * 30
    assert tokens_of_a_step(recipe, rows, 4) == 4 * alone
