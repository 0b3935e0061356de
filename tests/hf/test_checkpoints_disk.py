"""A disk that fills up and a data worker that dies, in real processes on a real, small file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from lowmem.recipe.load import load_recipe
from lowmem.run.checkpoint import verify
from tests.hf.tiny_runs import write_model, write_recipe

DISK_BYTES = 3 * 2**20

FILLING = """
import errno, os, sys
from pathlib import Path
import torch
import lowmem.hf.ending
from lowmem.cli.main import main
from lowmem.hf.trainer import LowMemTrainer

lowmem.hf.ending.write_report = lambda folder: folder / "report.md"
disk, step, *arguments = sys.argv[1:]
real_step, real_write, real_save = LowMemTrainer.training_step, os.write, torch.save

def is_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def training_step(self, *args):
    if self.state.global_step + 1 == int(step):
        if disk == "pretended":
            os.write = lambda file, data: is_full() if file > 2 else real_write(file, data)
            torch.save = is_full
        else:
            junk = os.open(Path(disk) / "junk", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                while True:
                    os.write(junk, bytes(4096))
            except OSError:
                os.close(junk)
    return real_step(self, *args)

LowMemTrainer.training_step = training_step
sys.exit(main(["train", *arguments]))
"""

DYING = """
import os, signal, sys
import torch.utils.data
import lowmem.hf.setup
from lowmem.cli.main import main
from lowmem.data.batches import TokenDataset

real_arguments, real_item, taken = lowmem.hf.setup.training_arguments, TokenDataset.__getitem__, []

def training_arguments(*args, **kwargs):
    made = real_arguments(*args, **kwargs)
    made.dataloader_num_workers = 1
    return made

def item(self, index):
    if torch.utils.data.get_worker_info() is not None:
        taken.append(index)
        if len(taken) == 32:
            os.kill(os.getpid(), signal.SIGKILL)
    return real_item(self, index)

lowmem.hf.setup.training_arguments = training_arguments
TokenDataset.__getitem__ = item
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture
def disk(tmp_path):
    """A file system of 3 MiB, or `pretended` where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield place if mounted else "pretended"
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def run_to_the_end_of_the_disk(tmp_path, disk, step, *overrides):
    """The finished process of a run whose disk fills up before `step`, and its arguments."""
    place = tmp_path if disk == "pretended" else disk
    recipe = write_recipe(tmp_path, write_model(tmp_path / "model"))
    arguments = [str(recipe), f"save.dir={place / 'run'}", "report.log_every=1", "data.eval=null", *overrides]
    return in_a_process(FILLING, str(disk), str(step), *arguments), arguments, place / "run"


def in_a_process(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def assert_fault_that_names(done, checkpoint):
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{checkpoint}" in done.stderr.splitlines()[-1]
    assert "No space left on device" in done.stderr.splitlines()[-1]
    verify(checkpoint)


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_fills_up_before_a_checkpoint_leaves_the_last_one_and_its_space(tmp_path, disk):
    done, arguments, run = run_to_the_end_of_the_disk(tmp_path, disk, 4, "save.every=2")
    assert_fault_that_names(done, run / "checkpoint-2")
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / ".saving").exists()
    (run.parent / "junk").unlink(missing_ok=True)
    assert train(load_recipe(arguments[0], arguments[1:])) == 0
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert train(load_recipe(arguments[0], [*arguments[1:], f"save.dir={tmp_path / 'whole'}"])) == 0
    one, other = (load_file(path / "model" / "model.safetensors") for path in (run, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_disk_that_fills_up_before_a_row_stops_the_run_with_whole_rows(tmp_path, disk):
    done, arguments, run = run_to_the_end_of_the_disk(
        tmp_path, disk, 26, "save.every=25", "train.max_steps=50"
    )
    assert_fault_that_names(done, run / "checkpoint-25")
    assert "metrics.jsonl cannot be written" in done.stderr
    assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")
    written = steps_of(run)
    assert written == list(range(1, written[-1] + 1))
    (run.parent / "junk").unlink(missing_ok=True)
    assert train(load_recipe(arguments[0], arguments[1:])) == 0
    assert steps_of(run) == list(range(1, 51))


def test_a_data_worker_that_dies_is_a_fault_that_names_the_last_checkpoint(tmp_path):
    recipe = write_recipe(tmp_path, write_model(tmp_path / "model"))
    arguments = [str(recipe), "data.eval=null", "train.max_steps=10", "save.every=1", "report.log_every=1"]
    done = in_a_process(DYING, *arguments)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "A process that prepares batches ended: DataLoader worker" in line
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert f"The last complete checkpoint is {newest}." in line
    verify(newest)
