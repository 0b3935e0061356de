"""Ctrl-C and SIGTERM: a checkpoint at the step boundary, exit code 130, and the run goes on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
import lowmem.hf.evaluation
from lowmem.hf.flow import train
from lowmem.hf.interrupt import Interrupt
from lowmem.hf.trainer import LowMemTrainer
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def steps_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_in_a_real_process_saves_a_checkpoint_that_the_run_continues_from(tmp_path, model_folder):
    recipe_file = write_recipe(tmp_path, model_folder)
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "lowmem.train",
        str(recipe_file),
        "train.max_steps=100000",
        "report.log_every=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping at the end of this step" in err
    (checkpoint,) = run.glob("checkpoint-*")
    stopped = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"interrupted at step {stopped}; saved {checkpoint}" in out
    assert steps_of(run) == list(range(1, stopped + 1))
    assert not (run / "model").exists()
    longer = tiny_recipe(tmp_path, model_folder, f"train.max_steps={stopped + 2}", "report.log_every=1")
    assert train(longer) == 0
    assert steps_of(run) == list(range(1, stopped + 3))


def interrupt_at_micro_batch(monkeypatch, number):
    real, calls = LowMemTrainer.training_step, []

    def training_step(self, *args):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(LowMemTrainer, "training_step", training_step)


def test_an_interrupted_and_continued_run_equals_an_uninterrupted_one(tmp_path, model_folder, monkeypatch):
    settings = ("train.gradient_accumulation_steps=2", "train.lr_scheduler.name=linear")
    recipe = tiny_recipe(tmp_path, model_folder, *settings)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at_micro_batch(patch, 5)  # in the middle of step 3
        assert train(recipe) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert train(recipe) == 0
    whole = tiny_recipe(tmp_path, model_folder, *settings, f"save.dir={tmp_path / 'whole'}")
    assert train(whole) == 0
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupt_during_an_evaluation_ends_it_and_saves_that_step(tmp_path, model_folder, monkeypatch):
    real = lowmem.hf.evaluation.held_out_loss

    def held_out_loss(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(lowmem.hf.evaluation, "held_out_loss", held_out_loss)
    assert train(tiny_recipe(tmp_path, model_folder, "eval.every=2")) == 130
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert "eval_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_an_interrupt_during_a_save_stops_at_that_checkpoint(tmp_path, model_folder, monkeypatch):
    settings = ("save.every=2", "report.log_every=3", "train.lr_scheduler.name=linear")
    recipe, real = tiny_recipe(tmp_path, model_folder, *settings), torch.save

    def save(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            signal.raise_signal(signal.SIGTERM)
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert train(recipe) == 130
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert train(recipe) == 0
    assert steps_of(tmp_path / "run") == [3, 6]
    whole = tiny_recipe(tmp_path, model_folder, *settings, f"save.dir={tmp_path / 'whole'}")
    assert train(whole) == 0
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupt_before_the_first_step_saves_nothing(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        lowmem.hf.evaluation, "held_out_loss", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT)
    )
    assert train(tiny_recipe(tmp_path, model_folder, "eval.at_start=true")) == 130
    assert "nothing to save" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("checkpoint-*"))


WAITING = """
import time
from lowmem.hf.interrupt import Interrupt
with Interrupt():
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""


def test_a_second_ctrl_c_ends_the_process_at_once_but_an_echo_of_the_first_does_not():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None, "what a launcher passes on is not a second Ctrl-C"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped at once" in err


def test_signals_are_as_before_after_the_block():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt() as interrupt:
        assert not interrupt.requested
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_process_of_a_launch_that_failed_is_not_ended_before_it_has_said_why(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(RuntimeError), Interrupt():
            raise RuntimeError("lost")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
