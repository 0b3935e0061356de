"""Checkpoints of real runs: which keep their optimizer state, what is said when one is damaged, what a trial finds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
import lowmem.hf.setup
from lowmem.errors import FaultError, RecipeError, RefusedError
from lowmem.hf.disk import optimizer_states_to_come, refuse_too_small_disk
from lowmem.hf.evaluation import evaluate
from lowmem.hf.flow import train
from lowmem.hf.interrupt import Interrupt
from lowmem.hf.setup import prepare_run
from lowmem.optim import LowMemOptimizer
from lowmem.run.checkpoint import verify
from lowmem.run.checkpoint_probe import state_in_small
from tests.hf.test_interrupt import interrupt_at_micro_batch
from tests.hf.tiny_runs import tiny_recipe, write_model
from tests.run.test_folder_lock import HOLDING

SETTINGS = ("save.every=2", "report.log_every=1", "train.lr_scheduler.name=linear", "data.eval=null")
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
MEASURED = {"seconds", "tokens_per_second", "peak_allocated_bytes"}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def names_in(checkpoint):
    return {path.name for path in checkpoint.iterdir()}


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_only_the_newest_checkpoint_keeps_its_optimizer_state_and_older_ones_can_be_evaluated(
    tmp_path, model_folder
):
    settings = [one for one in SETTINGS if not one.startswith("data.eval")]
    assert train(tiny_recipe(tmp_path, model_folder, *settings, "save.keep=3", "save.model=false")) == 0
    run = tmp_path / "run"
    assert names_in(run / "checkpoint-6") >= STATE
    for name in ("checkpoint-2", "checkpoint-4"):
        assert not names_in(run / name) & STATE
        verify(run / name)
    at_6 = evaluate(str(run))["loss"]
    shutil.rmtree(run / "checkpoint-6")
    at_4 = evaluate(str(run))["loss"]
    assert at_4 != at_6


def test_all_checkpoints_keep_their_optimizer_state_on_request(tmp_path, model_folder):
    assert train(tiny_recipe(tmp_path, model_folder, *SETTINGS, "save.optimizer_states=all")) == 0
    assert all(names_in(path) >= STATE for path in (tmp_path / "run").glob("checkpoint-*"))


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_it_had_been_whole(
    tmp_path, model_folder, capsys
):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS, "save.optimizer_states=all")
    assert train(recipe) == 0
    run = tmp_path / "run"
    expected, rows = load_file(run / "model" / "model.safetensors"), rows_of(run)
    shutil.rmtree(run / "model")
    shorten(run / "checkpoint-6" / "optimizer.pt")
    capsys.readouterr()
    assert train(recipe) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "is damaged" in line]
    assert line.startswith("checkpoint-6 is damaged (optimizer.pt has ")
    assert line.endswith("; falling back to checkpoint-4. The damaged one is now damaged-checkpoint-6.")
    found = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert rows_of(run) == rows
    assert {"checkpoint-4", "checkpoint-6", "damaged-checkpoint-6"} <= names_in(run)


def test_falling_back_to_a_checkpoint_without_optimizer_state_says_so_and_keeps_the_schedule(
    tmp_path, model_folder, capsys
):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    assert train(recipe) == 0
    run = tmp_path / "run"
    rows = rows_of(run)
    shorten(run / "checkpoint-6" / "model.safetensors")
    capsys.readouterr()
    assert train(recipe) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert "checkpoint-6 is damaged (model.safetensors has" in line
    assert "checkpoint-4, whose optimizer state is gone" in line
    assert "no checkpoint without damage has one" in line
    again = rows_of(run)
    for name in ("step", "lr", "tokens"):
        assert [row[name] for row in again] == [row[name] for row in rows]
    assert again[4]["loss"] == rows[4]["loss"], "the weights after step 4 are those that were"


def test_resuming_from_a_named_checkpoint_without_optimizer_state_names_the_one_that_has_it(
    tmp_path, model_folder
):
    assert train(tiny_recipe(tmp_path, model_folder, *SETTINGS)) == 0
    older = tmp_path / "run" / "checkpoint-4"
    other = tiny_recipe(
        tmp_path, model_folder, *SETTINGS, f"save.dir={tmp_path / 'other'}", f"resume={older}"
    )
    with pytest.raises(RecipeError, match=r"checkpoint-4 is gone .*the newest that has it is .*checkpoint-6"):
        train(other)


def test_a_resumed_run_writes_the_rows_of_one_that_went_through_wherever_it_stopped(
    tmp_path, model_folder, monkeypatch
):
    settings = ("data.eval=null", "report.log_every=4", "train.gradient_accumulation_steps=2")
    settings += ("train.max_steps=9", "save.every=3")
    whole = tiny_recipe(tmp_path, model_folder, *settings, f"save.dir={tmp_path / 'whole'}")
    assert train(whole) == 0
    expected = rows_of(tmp_path / "whole")
    assert [row["step"] for row in expected] == [4, 8, 9]
    recipe = tiny_recipe(tmp_path, model_folder, *settings)
    for micro_batch, step in ((3, 2), (9, 7)):  # in the middle of steps 2 and 7
        with monkeypatch.context() as patch:
            interrupt_at_micro_batch(patch, micro_batch)
            assert train(recipe) == 130
        assert rows_of(tmp_path / "run")[-1]["step"] == step, "an interrupt adds a row of its own"
    assert train(recipe) == 0
    assert rows_of(tmp_path / "run") == expected


def test_a_trial_before_the_first_step_leaves_nothing_and_says_what_a_checkpoint_costs(
    tmp_path, model_folder, capsys
):
    settings = (*SETTINGS, "save.model=false", "train.max_steps=1")
    assert train(tiny_recipe(tmp_path, model_folder, *settings)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints: ")]
    assert "checksums take" in line
    assert "a trial was written and read back in" in line
    assert names_in(tmp_path / "run") >= {"checkpoint-1", "run.lock"}
    assert not [name for name in names_in(tmp_path / "run") if name.startswith(".")]


@pytest.mark.parametrize("whole_bytes", [2**26, 0], ids=["whole", "in_small"])
def test_state_that_cannot_be_loaded_again_is_found_before_the_first_step(
    tmp_path, model_folder, monkeypatch, whole_bytes
):
    real = LowMemOptimizer.state_dict

    def state_dict(self):
        state = real(self)
        state["param_groups"][0]["rule"] = Interrupt()
        return state

    monkeypatch.setattr(LowMemOptimizer, "state_dict", state_dict)
    monkeypatch.setattr(lowmem.hf.setup, "SAVED_WHOLE_ON_TRIAL_BYTES", whole_bytes)
    with pytest.raises(FaultError, match=r"cannot be saved: optimizer\.pt cannot be read back.*Nothing was"):
        train(tiny_recipe(tmp_path, model_folder, *SETTINGS))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / ".saving").exists()
    settings = (*SETTINGS, "save.probe_at_start=false", "save.optimizer_states=all")
    late = tiny_recipe(tmp_path, model_folder, *settings)
    with pytest.raises(FaultError, match=r"checkpoint-\d cannot be read"):
        assert train(late) == 0
        shutil.rmtree(tmp_path / "run" / "checkpoint-6")
        train(late)


@pytest.mark.parametrize("name", ["adamw", "galore"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trial_state_has_the_structure_of_the_real_one(tmp_path, model_folder, name, dtype):
    settings = (f"optimizer={{name: {name}, lr: 1.0e-3}}", f"model.dtype={dtype}", "train.max_steps=1")
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS, *settings)
    small = state_in_small(prepare_run(recipe, Interrupt()).trainer.create_optimizer())
    assert train(recipe) == 0
    real = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert small["state"].keys() == real["state"].keys()
    for index, state in real["state"].items():
        assert {key: value.dtype for key, value in state.items()} == {
            key: value.dtype for key, value in small["state"][index].items()
        }
    assert sum(value.numel() for state in small["state"].values() for value in state.values()) < 200


def test_a_second_run_in_the_folder_of_a_running_one_is_refused_and_changes_nothing(tmp_path, model_folder):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RefusedError, match=rf"run is in use by another run: process {other.pid} on "):
            train(recipe)
        assert names_in(tmp_path / "run") == {"run.lock"}
        other.kill()
    assert train(recipe) == 0


def test_what_a_full_disk_left_of_the_reports_numbers_does_not_stop_the_next_start(tmp_path, model_folder):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    assert train(recipe) == 0
    memory = tmp_path / "run" / "memory.json"
    memory.write_text(memory.read_text()[:100])
    assert train(recipe) == 0
    assert not memory.exists(), "nothing was measured the second time"


def test_what_a_killed_run_was_writing_is_cleared_away_by_the_next(tmp_path, model_folder):
    recipe, run = tiny_recipe(tmp_path, model_folder, *SETTINGS), tmp_path / "run"
    for name in (".saving/checkpoint-2", ".model.saving", ".model.saving-int8-x1", ".checkpoint-2.deleting"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(bytes(9))
    assert train(recipe) == 0
    assert not [name for name in names_in(run) if name.startswith(".")]


def test_a_recipe_that_cannot_be_written_leaves_the_old_one(tmp_path, model_folder, monkeypatch):
    recipe = tiny_recipe(tmp_path, model_folder, *SETTINGS)
    assert train(recipe) == 0
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    longer = tiny_recipe(tmp_path, model_folder, *SETTINGS, "train.max_steps=8")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FaultError, match=r"could not be written: .*No space left.*checkpoint-6"):
            train(longer)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    assert train(longer) == 0


def test_the_disk_must_hold_the_weights_of_all_kept_and_two_optimizer_states(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 10 * 2**30))
    sizes = {"checkpoint_bytes": 2**30, "final_model_bytes": 0, "checkpoints_to_come": 4}
    for kept, has_one, states in (("newest", False, 2), ("newest", True, 1), ("all", False, 4)):
        count = optimizer_states_to_come(kept, checkpoints_to_come=4, has_one=has_one)
        assert count == states
    assert optimizer_states_to_come("newest", checkpoints_to_come=1, has_one=False) == 1
    refuse_too_small_disk(
        tmp_path, **sizes, optimizer_state_bytes=3 * 2**30, optimizer_states_to_come=2
    )  # 4 + 6
    with pytest.raises(
        FaultError, match=r"needs 16\.00 GiB: 4 checkpoint\(s\) of 1\.00 GiB, 4 of them with 3\."
    ):
        refuse_too_small_disk(tmp_path, **sizes, optimizer_state_bytes=3 * 2**30, optimizer_states_to_come=4)
