"""Faults of a run: each is one paragraph, and what was saved stays intact."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch

import lowmem.hf.ending
import lowmem.hf.model_setup
from lowmem.errors import FaultError
from lowmem.hf.flow import train
from tests.hf.tiny_runs import tiny_recipe, write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


pytestmark = pytest.mark.usefixtures("no_pictures")


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_too_little_disk_is_found_before_the_first_step(tmp_path, model_folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 100_000, 100_000))
    assert train(tiny_recipe(tmp_path, model_folder, "save.model=false", "train.max_steps=1")) == 0
    recipe = tiny_recipe(tmp_path, model_folder, f"save.dir={tmp_path / 'other'}", "save.every=1")
    with pytest.raises(
        FaultError, match=r"97\.66 KiB free, this run needs .*3 checkpoint\(s\) .*, 2 of them with"
    ):
        train(recipe)
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_last_one(tmp_path, model_folder, monkeypatch):
    recipe = tiny_recipe(tmp_path, model_folder, "save.every=2")
    real = torch.save

    def full_at_step_4(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_at_step_4)
    with pytest.raises(FaultError, match=r"checkpoint-4 could not be written.*checkpoint-2"):
        train(recipe)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(recipe) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_a_fault_that_names_it(tmp_path, model_folder, name):
    recipe = tiny_recipe(
        tmp_path, model_folder, "save.every=2", "train.max_steps=4", "save.optimizer_states=all"
    )
    assert train(recipe) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    file = tmp_path / "run" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FaultError, match=rf"checkpoint-2: {name} has \d+ bytes instead of \d+\. Restore"):
        train(recipe)


def test_a_learning_rate_that_explodes_shows_nan_and_stops_after_twenty_rows(tmp_path, model_folder):
    settings = (
        "optimizer.lr=1e30",
        "report.log_every=1",
        "train.max_steps=40",
        "save.every=4",
        "save.model=false",
    )
    with pytest.raises(FaultError, match=r"20 logged steps.*The last checkpoint is .*checkpoint-20"):
        train(tiny_recipe(tmp_path, model_folder, *settings, "train.lr_scheduler.name=constant"))
    rows = rows_of(tmp_path / "run")
    assert [row["loss"] for row in rows[-20:]] == ["NaN"] * 20


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2.00 GiB."
        ),
    ],
)
@pytest.mark.parametrize(
    "where", ["lowmem.hf.model_setup.load_model", "lowmem.optim.LowMemOptimizer.step_param"]
)
def test_too_little_memory_is_a_fault_with_advice(tmp_path, model_folder, monkeypatch, error, where):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, full)
    with pytest.raises(FaultError, match=r"allocate 2\.00 GiB.*train\.activation_checkpointing=true"):
        train(tiny_recipe(tmp_path, model_folder))


def test_a_bug_is_not_dressed_up_as_a_fault(tmp_path, model_folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("index out of range")

    monkeypatch.setattr(lowmem.hf.model_setup, "load_model", broken)
    with pytest.raises(RuntimeError, match="index out of range") as caught:
        train(tiny_recipe(tmp_path, model_folder))
    assert not isinstance(caught.value, FaultError)
