"""The command of several machines: two launchers that meet at an address, on one machine over loopback."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.hf.flow import train
from tests.hf.launches import SETTINGS, ended, free_port, start
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

pytestmark = pytest.mark.slow


def both_machines(*arguments, folders):
    port = str(free_port())
    launchers = [
        start(
            "fsdp2",
            *arguments,
            options=(
                *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            ),
            folder=folder,
        )
        for rank, folder in enumerate(folders)
    ]
    return [ended(launcher, seconds=300) for launcher in launchers]


def test_two_machines_train_the_weights_of_one_process(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    settings = (*SETTINGS, "train.max_steps=4", "eval.every=2")
    done = both_machines(
        str(recipe), *settings, "train.per_device_batch_size=2", folders=[tmp_path, tmp_path]
    )
    assert [each.returncode for each in done] == [0, 0], [each.stderr[-3000:] for each in done]
    assert [each.stdout.count("data.train:") for each in done] == [1, 0], "one process speaks"

    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    single = tiny_recipe(
        tmp_path, model, *settings, "train.per_device_batch_size=4", f"save.dir={tmp_path / 'single'}"
    )
    assert train(single) == 0
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("single", "run"))
    begun = load_file(model / "model.safetensors")
    moved = max((one[name] - begun[name]).abs().max().item() for name in one)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3 * moved


@pytest.mark.parametrize("broken", ["missing", "unreadable"])
def test_data_that_one_machine_lacks_ends_both_and_says_whose_it_is(tmp_path, broken):
    """Paths that are relative, from folders of which one is not complete."""
    recipe = write_recipe(tmp_path, write_model(tmp_path / "model"))
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(tmp_path / "train.jsonl", folder)
    rows = folders[1] / "train.jsonl"
    if broken == "missing":
        rows.unlink()
    else:
        rows.write_text('{"prompt": "1+1=", "resp')
    done = both_machines(str(recipe), "data.train.path=train.jsonl", folders=folders)
    assert all(each.returncode != 0 for each in done)
    for each in done:
        assert each.stderr.count("process 1, on ") == 1, each.stderr[-3000:]
        assert "train.jsonl" in each.stderr
        assert "lowmem/hf" not in each.stderr, "no traceback of ours"
