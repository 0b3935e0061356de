"""A recipe over two processes that divide the model, by the command and the files that a user has."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from tests.hf.launches import SETTINGS, ended, launched, ranks_of, rows_of, start, with_deepspeed
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

STEPS = 16
OF_TWO = (*SETTINGS, f"train.max_steps={STEPS}", "eval.every=8", "train.per_device_batch_size=2")

STRATEGIES = [
    "fsdp2",
    pytest.param("zero3", marks=with_deepspeed),
    *(pytest.param(name, marks=[with_deepspeed, pytest.mark.slow]) for name in ("zero1", "zero2")),
    pytest.param("ddp", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a strategy's whole run, made once."""
    folders: dict[str, Path] = {}

    def folder_of(strategy: str) -> Path:
        if strategy not in folders:
            folder = folders[strategy] = tmp_path_factory.mktemp(strategy)
            recipe = write_recipe(folder, write_model(folder / "model"))
            done = launched(strategy, str(recipe), *OF_TWO)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("data.train:") == 1, "one process speaks"
        return folders[strategy]

    return folder_of


def assert_same_bits(folder: Path, again: Path) -> None:
    whole, resumed = (load_file(run / "model" / "model.safetensors") for run in (folder / "run", again))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_the_weights_of_one(tmp_path, monkeypatch, trained, strategy):
    folder = trained(strategy)
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    single = tiny_recipe(
        tmp_path,
        folder / "model",
        *OF_TWO,
        "train.per_device_batch_size=4",
        f"save.dir={tmp_path / 'single'}",
    )
    assert train(single) == 0
    one, two = (
        load_file(run / "model" / "model.safetensors") for run in (tmp_path / "single", folder / "run")
    )
    begun = load_file(folder / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    moved = max((one[name] - begun[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3 * moved
    for left, right in zip(rows_of(tmp_path / "single"), rows_of(folder / "run"), strict=True):
        assert left["step"] == right["step"]
        for name in ("loss", "eval_loss", "tokens", "lr", "full_grad_norm"):
            if left.get(name) is not None and right.get(name) is not None:
                assert left[name] == pytest.approx(right[name], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, trained, strategy):
    folder, again, step = trained(strategy), tmp_path / "again", STEPS - 2
    again.mkdir()
    shutil.copytree(folder / "run" / f"checkpoint-{step}", again / f"checkpoint-{step}")
    text = (folder / "run" / "recipe.yaml").read_text()
    (again / "recipe.yaml").write_text(text.replace(str(folder / "run"), str(again)))
    resumed = launched(strategy, str(folder / "sums.yaml"), *OF_TWO, f"save.dir={again}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"continuing from step {step}" in resumed.stdout
    assert_same_bits(folder, again)


@pytest.mark.parametrize(
    ("strategy", "victim"),
    [
        ("fsdp2", 1),
        pytest.param("fsdp2", 0, marks=pytest.mark.slow),
        pytest.param("zero3", 1, marks=[with_deepspeed, pytest.mark.slow]),
    ],
)
def test_a_killed_process_ends_the_launch_with_one_message_and_the_same_command_goes_on_with_the_same_bits(
    tmp_path, trained, strategy, victim
):
    folder, again = trained(strategy), tmp_path / "again"
    command = (strategy, str(folder / "sums.yaml"), *OF_TWO, f"save.dir={again}")
    launcher = start(*command)
    while not (again / "checkpoint-2").is_dir():
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        time.sleep(0.01)
    os.kill(ranks_of(launcher.pid)[victim], signal.SIGKILL)
    killed = ended(launcher, seconds=120)
    assert killed.returncode != 0
    assert killed.stderr.count("Another process of this launch has ended") == 1
    saved = re.search(r"The last complete checkpoint is (\S+)\. The same command continues", killed.stderr)
    assert saved
    assert Path(saved[1]).parent == again
    assert "lowmem/hf" not in killed.stderr, "no traceback of ours"
    assert "exitcode  : -9" in killed.stderr

    resumed = launched(*command)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert int(re.search(r"continuing from step (\d+)", resumed.stdout)[1]) < STEPS
    assert_same_bits(folder, again)
