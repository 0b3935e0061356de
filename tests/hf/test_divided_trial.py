"""A checkpoint on trial where a model is divided: all processes look at the disk, and one says what is wrong."""

from __future__ import annotations

import os

import pytest

import lowmem.hf.divided_trial
from lowmem.errors import FaultError
from lowmem.hf.divided_trial import refuse_other_folders
from lowmem.hf.lora import add_lora
from lowmem.hf.whole_weights import state_dict_in_small, whole_state_dict
from lowmem.recipe.schema import LoraRecipe
from tests.hf.launches import SETTINGS, launched
from tests.hf.tiny_models import tiny_model
from tests.hf.tiny_runs import write_model, write_recipe

NEARLY_FULL = """
import os, shutil

if os.environ.get("RANK") == "1":
    disk_usage = shutil.disk_usage
    shutil.disk_usage = lambda path: disk_usage(path)._replace(free=1000)
"""
"""Read by every Python that starts with its folder on the path: the second process sees another disk."""


def test_a_disk_that_is_too_small_for_one_process_is_said_once_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(NEARLY_FULL)
    path = os.pathsep.join([str(tmp_path / "patch"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    recipe = write_recipe(tmp_path, write_model(tmp_path / "model"))
    run = launched("fsdp2", str(recipe), *SETTINGS)
    assert run.returncode != 0
    said = " ".join(run.stderr.split())
    assert said.count("has 1,000 B free, this run needs ") == 1
    assert "process 1, on " in said
    assert "lowmem/hf" not in said, "no traceback of ours"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_folder_that_is_another_one_on_each_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lowmem.hf.divided_trial, "SEEN_WITHIN_SECONDS", 0.0)
    trial = tmp_path / "run" / ".saving" / "checkpoint-0"
    trial.mkdir(parents=True)
    for rank in (0, 2):
        (trial / f"optimizer-{rank}-of-3.pt").touch()
    with pytest.raises(
        FaultError, match=r"process 1 has written to .*run is not there .* all machines share"
    ):
        refuse_other_folders(trial, 3)
    (trial / "optimizer-1-of-3.pt").touch()
    refuse_other_folders(trial, 3)


@pytest.mark.parametrize("has_adapters", [False, True])
def test_weights_on_trial_are_those_of_a_checkpoint_with_one_value_each(has_adapters):
    model = tiny_model(tie_word_embeddings=True)
    if has_adapters:
        model = add_lora(model, LoraRecipe(r=2))
    whole = whole_state_dict(model, keeps=True, only_trained=has_adapters)
    small = state_dict_in_small(model, only_trained=has_adapters)
    assert small.keys() == whole.keys()
    assert all(small[name].dtype == value.dtype for name, value in whole.items())
    assert all(value.numel() == 1 for value in small.values())
    assert len({id(each) for each in small.values()}) == len({id(each) for each in whole.values()})
