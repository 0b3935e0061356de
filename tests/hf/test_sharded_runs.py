"""A recipe over two processes that divide the model, by the command and the files that a user has."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from lowmem.memory.ledger import rounded
from tests.hf.launches import SETTINGS, ended, ranks_of, rows_of, start, with_deepspeed
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

STEPS = 16
OF_TWO = (
    *SETTINGS,
    f"train.max_steps={STEPS}",
    "save.keep=8",
    "eval.every=8",
    "train.per_device_batch_size=2",
)

LORA = ("lora={r: 4, alpha: 8}", "save.merge_lora=true")
BFLOAT16 = ("model.dtype=bfloat16",)
SETTINGS_OF = {
    "fsdp2 with LoRA": LORA,
    "zero3 with LoRA": LORA,
    "zero3 with LoRA in bfloat16": (*LORA, *BFLOAT16),
    "zero2 in bfloat16": BFLOAT16,
    "zero3 in bfloat16": BFLOAT16,
}
"""Of runs that have more than their strategy."""


ON_THE_HOST = ("--offload_optimizer_device", "cpu")
OPTIONS_OF = {"zero2 with state on the host": ON_THE_HOST, "zero3 with state on the host": ON_THE_HOST}
"""Of the launcher."""


def named(*names: str) -> list[object]:
    """Those that `make test` runs have no mark: one of each kind."""
    quick = ("fsdp2", "zero3")
    return [
        pytest.param(
            name,
            marks=[
                *([with_deepspeed] if name.startswith("zero") else []),
                *([] if name in quick else [pytest.mark.slow]),
            ],
        )
        for name in names
    ]


def run_of(name: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    return start(name.split()[0], *arguments_of(name, folder, *more), options=OPTIONS_OF.get(name, ()))


def arguments_of(name: str, folder: Path, *more: str) -> tuple[str, ...]:
    return (str(folder / "sums.yaml"), *OF_TWO, *SETTINGS_OF.get(name, ()), *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a whole run, made once."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            write_recipe(folder, write_model(folder / "model"))
            done = ended(run_of(name, folder, "report.plan=true"))
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("a trial was written and read back") == 1
            assert done.stdout.count("data.train:") == 1, "one process speaks"
            if name in ("fsdp2", "zero3"):
                assert done.stdout.count("matrices stepped where their rows are: little is to be sent") == 1
                assert (
                    done.stdout.count("matrices stepped whole, each at one process: their rule needs all")
                    == 1
                )
        return folders[name]

    return folder_of


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def single_run(name: str, folder: Path, out: Path, monkeypatch) -> Path:
    """The run of one process on the rows of two."""
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    _, *settings = arguments_of(name, folder, "train.per_device_batch_size=4", f"save.dir={out / 'single'}")
    assert train(tiny_recipe(out, folder / "model", *settings)) == 0
    return out / "single"


def assert_same_bits(folder: Path, again: Path) -> None:
    for part in ("model", f"checkpoint-{STEPS}"):
        whole, resumed = (weights_in(run / part) for run in (folder / "run", again))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "name",
    named(
        *("fsdp2", "zero3", "zero1", "zero2", "ddp", "fsdp2 with LoRA", "zero3 with LoRA"),
        *("zero2 with state on the host", "zero3 with state on the host"),
    ),
)
def test_two_processes_train_the_weights_of_one(tmp_path, monkeypatch, trained, name):
    folder = trained(name)
    runs = (single_run(name, folder, tmp_path, monkeypatch), folder / "run")
    begun = weights_in(folder / "run" / "checkpoint-2")
    one, two = (weights_in(run / f"checkpoint-{STEPS}") for run in runs)
    assert one.keys() == two.keys()
    moved = max((one[each] - begun[each]).abs().max().item() for each in one)
    assert moved > 1e-3
    assert max((one[each] - two[each]).abs().max().item() for each in one) < 1e-3 * moved
    one, two = (weights_in(run / "model") for run in runs)
    assert one.keys() == two.keys()
    assert max((one[each] - two[each]).abs().max().item() for each in one) < 1e-3 * moved
    for left, right in zip(*(rows_of(run) for run in runs), strict=True):
        assert left["step"] == right["step"]
        for key in ("loss", "eval_loss", "tokens", "lr", "full_grad_norm"):
            if left.get(key) is not None and right.get(key) is not None:
                assert left[key] == pytest.approx(right[key], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    named(
        *("fsdp2", "zero3", "zero3 in bfloat16", "zero1", "zero2", "zero2 in bfloat16"),
        *("fsdp2 with LoRA", "zero3 with LoRA", "zero3 with LoRA in bfloat16"),
        *("zero2 with state on the host", "zero3 with state on the host"),
    ),
)
def test_the_report_has_what_each_process_held_beside_what_the_formulas_say(trained, name):
    run = trained(name) / "run"
    found = json.loads((run / "processes.json").read_text())
    state = []
    for rank in range(2):
        saved = torch.load(run / f"checkpoint-{STEPS}" / f"optimizer-{rank}-of-2.pt", weights_only=True)
        tensors = [value for each in saved["state"]["state"].values() for value in each.values()]
        state.append(sum(rounded(value.nbytes) for value in tensors))
    assert found["optimizer_state_bytes"] == {"least": min(state), "most": max(state)}
    assert found["peak_allocated_bytes"] is None
    assert "no allocator counts" in found["not_measured"]["peak_allocated_bytes"]
    if name.split()[1:3] == ["with", "LoRA"]:
        assert found["planned"] is None
        assert "adapters have no memory formula" in found["not_measured"]["planned"]
    else:
        for what in ("weights_bytes", "optimizer_state_bytes"):
            assert found["planned"][what] == found[what]
    assert "## Memory of each process" in (run / "report.md").read_text()


@pytest.mark.parametrize("name", named("fsdp2 with LoRA", "zero3 with LoRA"))
def test_weights_that_are_frozen_have_no_state(trained, name):
    checkpoint = trained(name) / "run" / f"checkpoint-{STEPS}"
    for rank in range(2):
        saved = torch.load(checkpoint / f"optimizer-{rank}-of-2.pt", weights_only=True)
        assert saved["places"]["ranges"]
        assert all("lora_" in parameter for parameter in saved["places"]["ranges"])
    assert all("lora_" in parameter for parameter in weights_in(checkpoint))


@pytest.mark.parametrize("name", named("zero3 in bfloat16", "zero2 in bfloat16"))
def test_in_bfloat16_the_losses_are_those_of_one_process(tmp_path, monkeypatch, trained, name):
    """Not the weights: DeepSpeed keeps float32 ones beside them, where one process rounds at random."""
    folder = trained(name)
    one, two = (
        [row["loss"] for row in rows_of(run) if "loss" in row]
        for run in (single_run(name, folder, tmp_path, monkeypatch), folder / "run")
    )
    assert two == pytest.approx(one, rel=5e-3)
    assert two[-1] < 0.9 * two[0]


@pytest.mark.parametrize(
    "name",
    named(
        "zero3",
        "zero3 in bfloat16",
        "zero1",
        "zero2 in bfloat16",
        "ddp",
        "fsdp2 with LoRA",
        "zero3 with LoRA",
        "zero3 with LoRA in bfloat16",
        "zero2 with state on the host",
        "zero3 with state on the host",
    ),
)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, trained, name):
    folder, again, step = trained(name), tmp_path / "again", STEPS - 2
    again.mkdir()
    shutil.copytree(folder / "run" / f"checkpoint-{step}", again / f"checkpoint-{step}")
    text = (folder / "run" / "recipe.yaml").read_text()
    (again / "recipe.yaml").write_text(text.replace(str(folder / "run"), str(again)))
    resumed = ended(run_of(name, folder, f"save.dir={again}"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"continuing from step {step}" in resumed.stdout
    assert_same_bits(folder, again)


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("fsdp2", 1),
        pytest.param("fsdp2", 0, marks=pytest.mark.slow),
        pytest.param("zero3", 1, marks=[with_deepspeed, pytest.mark.slow]),
    ],
)
def test_a_killed_process_ends_the_launch_with_one_message_and_the_same_command_goes_on_with_the_same_bits(
    tmp_path, trained, name, victim
):
    folder, again = trained(name), tmp_path / "again"
    launcher = run_of(name, folder, f"save.dir={again}")
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

    resumed = ended(run_of(name, folder, f"save.dir={again}"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert int(re.search(r"continuing from step (\d+)", resumed.stdout)[1]) < STEPS
    assert_same_bits(folder, again)
