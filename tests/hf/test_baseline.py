"""AdamW on the same work, measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

import lowmem.hf.baseline
import lowmem.hf.ending
import lowmem.hf.setup
from lowmem.hf.adamw_variants import AdamWInBackward, adamw_variants
from lowmem.hf.baseline import VARIANTS, main, measure_baselines, single_process_environment
from lowmem.hf.flow import train
from lowmem.hf.recorded_batches import BatchRecorder, RecordedBatches
from lowmem.recipe.dump import dump_recipe
from tests.hf.tiny_runs import tiny_config, tiny_recipe, write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


def in_this_process(command, env, **how):
    """subprocess.run without the seconds of a new interpreter."""
    assert command[1:3] == ["-m", "lowmem.hf.baseline"]
    return subprocess.CompletedProcess(command, main(command[3:]), stdout="", stderr="")


def document(tmp_path):
    return json.loads((tmp_path / "run" / "memory.json").read_text())


def test_adamw_is_measured_in_a_fresh_process_and_compared(tmp_path, model_folder, capsys):
    recipe = tiny_recipe(
        tmp_path, model_folder, "report.baseline=adamw", "train.gradient_accumulation_steps=2"
    )
    assert train(recipe) == 0
    found = document(tmp_path)
    assert (
        set(found["baselines"]) == set(VARIANTS) == {"adamw_fused", "adamw_foreach", "adamw_fused_backward"}
    )
    state_bytes = 0  # of torch's AdamW: two tensors of each parameter, in blocks of 512 bytes
    for param in LlamaForCausalLM(tiny_config()).parameters():
        state_bytes += 2 * -(-param.nbytes // 512) * 512
    for account in found["baselines"].values():
        assert account["source"] == "measured"
        assert account["steps"] == 3
        assert sum(account["parts"].values()) == account["peak_bytes"]
        assert account["parts"]["weights"] == found["parts"]["weights"], "the same model"
    fused = found["baselines"]["adamw_fused"]
    assert state_bytes <= fused["parts"]["optimizer_state"] <= state_bytes + 512 * 21, "and the step counts"
    assert found["saved_bytes"] == fused["peak_bytes"] - found["peak_bytes"]
    assert "AdamW fused" in capsys.readouterr().out


def test_the_baseline_of_adamw_itself_needs_what_the_run_needs(tmp_path, model_folder, monkeypatch):
    """The same batches, settings and meter: with the same optimizer the peaks nearly agree."""
    monkeypatch.setattr(subprocess, "run", in_this_process)
    settings = (
        "optimizer={name: adamw, lr: 0.001}",
        "report.baseline=adamw",
        "train.activation_checkpointing=true",
    )
    assert train(tiny_recipe(tmp_path, model_folder, *settings)) == 0
    found = document(tmp_path)
    ours, fused = found["parts"], found["baselines"]["adamw_fused"]["parts"]
    assert ours["activations"] == fused["activations"]
    assert ours["gradients"] == fused["gradients"]
    assert (
        abs(found["peak_bytes"] - found["baselines"]["adamw_fused"]["peak_bytes"]) < 0.1 * found["peak_bytes"]
    )


def test_updates_in_backward_hold_fewer_gradients(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    few_tokens = ("train.per_device_batch_size=1", "train.activation_checkpointing=true")
    settings = ("report.baseline=adamw", "data.eval=null", "save.model=false", *few_tokens)
    assert train(tiny_recipe(tmp_path, model_folder, *settings)) == 0
    found = document(tmp_path)["baselines"]
    assert found["adamw_fused_backward"]["parts"]["gradients"] < found["adamw_fused"]["parts"]["gradients"]
    assert found["adamw_foreach"]["peak_bytes"] >= found["adamw_fused"]["peak_bytes"]


def test_a_lora_run_is_compared_with_adamw_on_lora(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    assert (
        train(tiny_recipe(tmp_path, model_folder, "report.baseline=adamw", "lora.r=2", "data.packing=true"))
        == 0
    )
    found = document(tmp_path)
    assert found["baselines"]["adamw_fused"]["parts"]["weights"] == found["parts"]["weights"]


def test_a_variant_that_does_not_fit_is_null_with_the_reason(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)

    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    variants = adamw_variants(0.0, 0.0) | {"adamw_foreach": full}
    monkeypatch.setattr(lowmem.hf.baseline, "adamw_variants", lambda lr, weight_decay: variants)
    assert train(tiny_recipe(tmp_path, model_folder, "report.baseline=adamw")) == 0
    found = document(tmp_path)
    assert found["baselines"]["adamw_foreach"] is None
    assert "out of memory" in found["conditions"]["adamw_foreach"]
    assert found["baselines"]["adamw_fused"]["peak_bytes"] > 0


def test_a_baseline_process_that_dies_leaves_the_run_done(tmp_path, model_folder, monkeypatch):
    def killed(command, **how):
        return subprocess.CompletedProcess(command, -9, stdout="", stderr="some\nlast words\n")

    monkeypatch.setattr(subprocess, "run", killed)
    assert train(tiny_recipe(tmp_path, model_folder, "report.baseline=adamw")) == 0
    found = document(tmp_path)
    assert found["baselines"]["adamw_fused"] is None
    assert found["saved_bytes"] is None
    assert (
        found["conditions"]["adamw_fused"]
        == "not measured: the baseline process ended with code -9: last words"
    )


@pytest.mark.parametrize("settings", [(), ("lora.r=2", "save.merge_lora=true")], ids=["full", "merged"])
def test_the_model_and_its_optimizer_are_gone_before_the_baseline_begins(
    tmp_path, model_folder, monkeypatch, settings
):
    """On a GPU they would take the memory that AdamW is measured in."""
    alive = []
    real = lowmem.hf.setup.trainable_model

    def trainable_model(*args, **kwargs):
        model = real(*args, **kwargs)
        alive.extend(weakref.ref(param) for param in model.parameters())
        return model

    def run(command, **how):
        assert len(alive) > 20
        assert not any(param() is not None for param in alive)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="checked")

    monkeypatch.setattr(lowmem.hf.setup, "trainable_model", trainable_model)
    monkeypatch.setattr(subprocess, "run", run)
    recipe = tiny_recipe(
        tmp_path, model_folder, "report.baseline=adamw", "eval.every=2", "save.every=3", *settings
    )
    assert train(recipe) == 0
    assert document(tmp_path)["conditions"]["adamw_fused"].endswith("checked")


def test_no_baseline_starts_no_process(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    assert train(tiny_recipe(tmp_path, model_folder)) == 0


def test_without_recorded_steps_there_is_nothing_to_measure(tmp_path, model_folder):
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(dump_recipe(tiny_recipe(tmp_path, model_folder)))
    assert set(measure_baselines(recipe_file, BatchRecorder()).values()) == {
        "no step of this run was recorded"
    }


def test_the_fresh_process_does_not_join_a_distributed_launch(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    kept = single_process_environment()
    assert not {"RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & set(kept)
    assert kept["OMP_NUM_THREADS"] == "3"


def test_recorded_batches_come_back_in_order(tmp_path):
    recorder = BatchRecorder()
    for step in (1, 2, 11):
        recorder(step, [{"input_ids": torch.full((2, 3 + micro), 10 * step + micro)} for micro in range(3)])
    recorder.save(tmp_path / "batches.safetensors")
    batches = RecordedBatches(tmp_path / "batches.safetensors")
    assert [int(batch["input_ids"][0, 0]) for batch in batches] == [10, 11, 12, 20, 21, 22, 110, 111, 112]
    assert (batches.num_steps, batches.micro_batches) == (3, 3)
    assert recorder.longest_sequence() == 5


def test_adamw_in_backward_equals_adamw():
    def trained(make):
        set_seed(0)
        model = LlamaForCausalLM(tiny_config())
        optimizer = make(model)
        ids = torch.arange(3, 23).reshape(2, 10)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.named_parameters())

    one = trained(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True))
    other = trained(lambda model: AdamWInBackward(model.parameters(), lr=1e-2, weight_decay=0.1))
    assert all(torch.equal(one[name], other[name]) for name in one)
