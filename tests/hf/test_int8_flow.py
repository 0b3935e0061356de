"""`model.weights: int8` in a recipe, from loading to the final model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowmem.hf.ending
from lowmem.cli.main import main
from lowmem.errors import RecipeError
from lowmem.hf.flow import train
from lowmem.hf.generation import Generator
from lowmem.hf.model import load_model
from lowmem.hf.simulated_plan import checkpoint_of, simulated_plan
from lowmem.memory.ledger import rounded
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of
from lowmem.quant.int8_weight import Int8Module
from lowmem.recipe.schema import ModelRecipe
from tests.hf.test_flow_processes import launched
from tests.hf.test_flow_resume import assert_equal_checkpoints, cut_back, rows_without_times
from tests.hf.tiny_models import tiny_model
from tests.hf.tiny_runs import character_tokenizer, tiny_recipe, write_model, write_recipe

INT8 = ("model.weights=int8", "model.int8.group_size=16")
LR = {"sgd": 3.0, "sgd_sai": 3.0}


def projects(name: str) -> bool:
    group = optimizer_class(name)([torch.nn.Parameter(torch.zeros(512, 512))]).param_groups[0]
    return optimizer_class(name).rule(group, (512, 512)).is_projected


WAYS = [
    (name, execution)
    for name in OPTIMIZERS
    for execution in ("plain", "project", "fused")
    if execution != "project" or projects(name)
]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def int8_recipe(tmp_path, model, *overrides):
    return tiny_recipe(tmp_path, model, *INT8, *overrides)


def execution_overrides(name, execution):
    settings = "rank: 4, refresh_every: 3" if "rank" in settings_of(optimizer_class(name)) else ""
    if name == "block_adam":
        settings = "refresh_every: 1"  # in six steps each of four blocks has a turn
    clips = [] if execution != "fused" else ["train.max_grad_norm=null"]
    return [
        f"optimizer={{name: {name}, lr: {LR.get(name, 3.0e-3)}, {settings}}}",
        f"train.execution={execution}",
        *clips,
    ]


def dequantised(folder) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    floats = {name: value for name, value in model.state_dict().items() if "weight_" not in name}
    return floats | {
        f"{path}.weight": module.dequantized()
        for path, module in model.named_modules()
        if isinstance(module, Int8Module)
    }


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_optimizer_trains_int8_weights_in_every_execution(tmp_path, model_folder, way):
    """And what it leaves: checkpoints in int8, the final model in float, bit by bit the same."""
    recipe = int8_recipe(tmp_path, model_folder, "save.every=3", *execution_overrides(*way))
    start = load_model(recipe.model, seed=0).state_dict()
    assert train(recipe) == 0
    checkpoint, final = tmp_path / "run" / "checkpoint-6", tmp_path / "run" / "model"
    trained = load_file(checkpoint / "model.safetensors")
    codes = [name for name in trained if name.endswith("weight_codes")]
    assert len(codes) == 14
    assert all(trained[name].dtype is torch.int8 for name in codes)
    assert not any(torch.equal(trained[name], start[name]) for name in codes)
    assert equal(load_file(final / "model.safetensors"), dequantised(checkpoint))
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(final).model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("embeddings", ["false", "true"])
@pytest.mark.parametrize("execution", ["plain", "project", "fused"])
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path, model_folder, execution, embeddings):
    settings = (
        *execution_overrides("galore", execution), f"model.int8.embeddings={embeddings}", "model.dtype=bfloat16",
        "train.gradient_accumulation_steps=2", "save.every=1", "save.keep=9", "save.optimizer_states=all",
        "eval.every=2", "report.log_every=1",
    )  # fmt: skip
    whole = int8_recipe(tmp_path, model_folder, *settings, f"save.dir={tmp_path / 'whole'}")
    assert train(whole) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 3)
    assert train(int8_recipe(tmp_path, model_folder, *settings, f"save.dir={tmp_path / 'cut'}")) == 0
    for step in (4, 6):
        assert_equal_checkpoints(*(tmp_path / run / f"checkpoint-{step}" for run in ("whole", "cut")))
    finals = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut")]
    assert equal(*finals)
    assert rows_without_times(tmp_path / "whole") == rows_without_times(tmp_path / "cut")


def test_the_final_model_stays_in_int8_on_request(tmp_path, model_folder):
    assert train(int8_recipe(tmp_path, model_folder, "save.int8=true", "save.every=3")) == 0
    final, checkpoint = (tmp_path / "run" / name / "model.safetensors" for name in ("model", "checkpoint-6"))
    assert equal(load_file(final), load_file(checkpoint))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "plain")]) == 0
    assert equal(load_file(tmp_path / "plain" / "model.safetensors"), dequantised(final.parent))


def test_an_int8_folder_is_trained_as_it_is_stored(tmp_path, model_folder):
    assert train(int8_recipe(tmp_path, model_folder, "save.int8=true")) == 0
    stored = tmp_path / "run" / "model"
    recipe = tiny_recipe(tmp_path, stored, "model.weights=int8", f"save.dir={tmp_path / 'again'}")
    assert equal(load_model(recipe.model, seed=0).state_dict(), load_file(stored / "model.safetensors"))
    assert train(recipe) == 0
    assert load_file(tmp_path / "again" / "model" / "model.safetensors").keys() == dequantised(stored).keys()


def test_an_int8_folder_is_trained_in_float_where_nothing_is_said(tmp_path, model_folder):
    assert train(int8_recipe(tmp_path, model_folder, "save.int8=true", "model.int8.embeddings=true")) == 0
    stored = tmp_path / "run" / "model"
    model = load_model(ModelRecipe(name_or_path=str(stored), dtype="float32"), seed=0)
    assert equal(model.state_dict(), dequantised(stored))
    assert model.lm_head.weight.requires_grad
    assert not getattr(model.config, "quantization_config", None)
    recipe = tiny_recipe(tmp_path, stored, f"save.dir={tmp_path / 'float'}", "save.every=6")
    assert train(recipe) == 0
    assert not any(
        "codes" in name for name in load_file(tmp_path / "float" / "checkpoint-6" / "model.safetensors")
    )


@pytest.mark.parametrize("keep", ["false", "true"])
def test_a_runs_model_is_evaluated_and_answers(tmp_path, model_folder, keep, capsys):
    recipe = int8_recipe(tmp_path, model_folder, f"save.int8={keep}", "save.every=6")
    assert train(recipe) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained_loss = rows[-1]["eval_loss"]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(trained_loss, rel=1e-5)
    assert "".join(Generator(str(tmp_path / "run")).stream("12+3=", max_new_tokens=3))
    shutil.rmtree(tmp_path / "run" / "model")
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0, "the checkpoint, in int8"
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained_loss, rel=1e-5)


def test_the_report_compares_with_adamw_on_float_weights_and_with_its_plan(tmp_path, model_folder):
    recipe = int8_recipe(
        tmp_path, model_folder, "report.baseline=adamw", "report.plan=true", "model.dtype=bfloat16"
    )
    assert train(recipe) == 0
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert found["conditions"]["weights"] == "int8"
    assert found["planned"]["parts"] == found["parts"]
    adamw = found["baselines"]["adamw_fused"]
    assert adamw["source"] == "measured"
    model = load_model(replace(recipe.model, weights="bf16"), seed=0)
    floats = [*model.parameters(), *model.buffers()]
    assert adamw["parts"]["weights"] == sum(rounded(tensor.nbytes) for tensor in floats)


@pytest.mark.parametrize("keep", ["false", "true"])
def test_the_plan_says_what_checkpoint_and_final_model_take_on_the_disk(tmp_path, model_folder, keep):
    recipe = int8_recipe(tmp_path, model_folder, "model.dtype=bfloat16", f"save.int8={keep}", "save.every=6")
    simulated = simulated_plan(recipe)
    found = checkpoint_of(recipe, simulated)
    assert train(recipe) == 0
    written = [
        sum(tensor.nbytes for tensor in load_file(tmp_path / "run" / name / "model.safetensors").values())
        for name in ("checkpoint-6", "model")
    ]
    assert [found.disk_bytes - simulated.state_bytes, found.final_model_bytes] == written


def test_the_recipe_without_files_of_its_own_works_too(tmp_path):
    recipe = tiny_recipe(
        tmp_path, "builtin:tiny-llama", "model.weights=int8", "train.max_steps=2", "save.every=2"
    )
    assert train(recipe) == 0
    assert equal(
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
        dequantised(tmp_path / "run" / "checkpoint-2"),
    )


def test_damage_of_a_checkpoint_is_found_by_its_checksums(tmp_path, model_folder):
    """One flipped bit: no header shows it."""
    assert train(int8_recipe(tmp_path, model_folder, "save.every=3", "save.model=false")) == 0
    file = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(RecipeError, match=r"checkpoint-6 is damaged: model\.safetensors"):
        Generator(str(tmp_path / "run"))


@pytest.mark.parametrize("target", ["weight_scales", "weight_codes"])
def test_a_missing_tensor_of_a_folder_is_named_without_a_traceback(tmp_path, model_folder, target, capsys):
    assert train(int8_recipe(tmp_path, model_folder, "save.int8=true")) == 0
    file = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.up_proj.{target}"]
    save_file(tensors, file, {"format": "pt"})
    path = write_recipe(tmp_path, file.parent)
    capsys.readouterr()
    assert main(["train", str(path), "model.weights=int8", f"save.dir={tmp_path / 'next'}"]) == 2
    said = capsys.readouterr().err
    assert f"model.layers.1.mlp.up_proj.{target} is missing" in said
    assert "Traceback" not in said


def test_a_model_whose_matrices_are_not_in_linear_layers_is_refused_with_the_reason(tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    character_tokenizer().save_pretrained(tmp_path / "gpt2")
    path = write_recipe(tmp_path, tmp_path / "gpt2")
    assert main(["train", str(path), "model.weights=int8"]) == 2
    assert "Conv1D, which keeps its matrix transposed" in capsys.readouterr().err


def test_another_format_of_weights_does_not_continue_a_run(tmp_path, model_folder):
    assert train(int8_recipe(tmp_path, model_folder, "save.every=3")) == 0
    with pytest.raises(RecipeError, match=r"model\.weights: 'int8' there, 'bf16' in this recipe"):
        train(tiny_recipe(tmp_path, model_folder, "train.max_steps=9"))


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tmp_path, model_folder):
    settings = (
        *INT8,
        "train.max_steps=4",
        "save.every=4",
        "optimizer={name: sgd, lr: 0.05}",
        "save.int8=true",
    )
    file = write_recipe(tmp_path, model_folder)
    both = launched(file, *settings, "train.per_device_batch_size=2")
    assert both.returncode == 0, both.stderr
    assert main(["train", str(file), *settings, f"save.dir={tmp_path / 'single'}"]) == 0
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("single", "run"))
    for name in one:
        if one[name].dtype is torch.int8:
            apart = (one[name].int() - two[name].int()).abs()
            assert apart.max() <= 1
            assert apart.float().mean() < 0.02, "but for codes that fell between two"
