"""A run from recipe to report: what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem.hf.ending
import lowmem.hf.model_setup
from lowmem.errors import RecipeError
from lowmem.hf.evaluation import evaluate
from lowmem.hf.flow import train
from lowmem.recipe.load import load_recipe
from tests.hf.tiny_runs import tiny_recipe, write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """(recipe, run folder) of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(
        folder, model_folder, "save.every=3", "eval.at_start=true", "eval.every=2", "train.max_steps=7"
    )
    assert train(recipe) == 0
    return recipe, folder / "run"


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


pytestmark = pytest.mark.usefixtures("no_pictures")


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_promised_files(finished):
    _, run = finished
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "memory.json", "report.md", "model"} <= names
    assert {"checkpoint-6", "checkpoint-7"} <= names, "keep: 2 leaves the newest two"
    assert "checkpoint-3" not in names
    assert not [name for name in names if name.startswith(".")], "nothing unfinished is left"


def test_the_written_recipe_is_the_one_that_ran(finished):
    recipe, run = finished
    assert load_recipe(run / "recipe.yaml") == recipe


def test_nothing_but_tensors_is_pickled_and_weights_are_safetensors(finished):
    _, run = finished
    for path in run.rglob("*"):
        assert path.suffix not in (".bin", ".pkl")
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)


def test_training_rows_hold_every_measure(finished):
    _, run = finished
    rows = [row for row in rows_of(run) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 7], "each log_every steps, and the last"
    norms = "grad_norm applied_grad_norm full_grad_norm"
    keys = f"step epoch loss lr {norms} tokens tokens_per_second peak_allocated_bytes seconds"
    assert all(list(row) == keys.split() for row in rows)
    assert all(row["tokens_per_second"] > 0 and row["peak_allocated_bytes"] > 0 for row in rows)
    assert rows[0]["tokens"] < rows[1]["tokens"] < rows[-1]["tokens"]
    assert rows[0]["seconds"] < rows[-1]["seconds"]


def test_evaluations_come_at_the_start_each_few_steps_and_at_the_end(finished):
    _, run = finished
    rows = [row for row in rows_of(run) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 7]
    assert all(list(row) == ["step", "eval_loss", "eval_perplexity", "exact_match"] for row in rows)
    assert all(row["exact_match"] is None for row in rows), "loss_only generates nothing"
    assert all(row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in rows)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_the_final_model_is_the_evaluated_one_and_loads_with_plain_transformers(finished):
    """The loss is computed here by hand, a row at a time."""
    recipe, run = finished
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    total, tokens = 0.0, 0
    with open(recipe.data.eval.path) as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
        answer = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        total += cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    logged = [row for row in rows_of(run) if "eval_loss" in row][-1]["eval_loss"]
    assert logged == pytest.approx(total / tokens, rel=1e-5)
    assert evaluate(str(run))["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert evaluate(str(run))["tokens"] == tokens


def test_the_final_model_generates_with_its_cache_on_and_knows_the_template(finished):
    _, run = finished
    assert json.loads((run / "model" / "config.json").read_text())["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False)
    assert text == "1+1=\n"


def test_memory_is_measured_and_the_parts_sum_to_the_peak(finished):
    _, run = finished
    document = json.loads((run / "memory.json").read_text())
    assert document["source"] == "measured"
    assert sum(document["parts"].values()) == document["peak_bytes"] > 0
    assert document["steps"] == 3
    assert document["baselines"]["adamw_fused"] is None, "report.baseline: none"
    assert document["conditions"]["parameters"] == sum(
        value.numel() for value in load_file(run / "model" / "model.safetensors").values()
    )


def test_the_same_recipe_measures_the_same_bytes_and_trains_the_same_weights(
    finished, tmp_path, model_folder
):
    _, run = finished
    again = tiny_recipe(tmp_path, model_folder, "eval.every=2", "train.max_steps=7")
    assert train(again) == 0
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (json.loads((folder / "memory.json").read_text()) for folder in (run, tmp_path / "run"))
    assert first["parts"] == second["parts"]


def test_the_folder_of_another_recipe_is_refused_with_the_keys_that_differ(finished, tmp_path, model_folder):
    _, run = finished
    before = (run / "recipe.yaml").read_text()
    other = tiny_recipe(tmp_path, model_folder, f"save.dir={run}", "optimizer.lr=0.5", "train.seed=4")
    with pytest.raises(RecipeError) as caught:
        train(other)
    text = str(caught.value)
    assert "optimizer.lr: 0.003 there, 0.5 in this recipe" in text
    assert "train.seed: 0 there, 4 in this recipe" in text
    assert "save.every" not in text, "what may change is not named"
    assert "Choose another save.dir" in text
    assert (run / "recipe.yaml").read_text() == before


def test_a_folder_in_which_nothing_was_trained_takes_another_recipe(tmp_path, model_folder):
    wrong = tiny_recipe(tmp_path, model_folder, "optimizer.target=[attention]", "optimizer.lr=1.0")
    with pytest.raises(RecipeError, match="attention"):
        train(wrong)
    assert (tmp_path / "run" / "recipe.yaml").exists()
    assert train(tiny_recipe(tmp_path, model_folder, "save.model=false", "train.max_steps=1")) == 0


def test_resume_never_refuses_a_folder_with_checkpoints(finished, tmp_path, model_folder):
    _, run = finished
    same = load_recipe(run / "recipe.yaml", ["resume=never"])
    with pytest.raises(RecipeError, match=r"holds 2 checkpoint\(s\), the newest checkpoint-7"):
        train(same)


@pytest.mark.parametrize("name", ["nowhere", "model"])
def test_resuming_from_what_is_no_checkpoint_names_those_there_are(finished, name):
    _, run = finished
    recipe = load_recipe(run / "recipe.yaml", [f"resume={run / name}"], files_must_exist=False)
    with pytest.raises(RecipeError, match=f"{name} is not a checkpoint folder.*checkpoint-7"):
        train(recipe)


def test_resuming_from_an_older_checkpoint_next_to_newer_ones_is_refused(finished):
    _, run = finished
    with pytest.raises(RecipeError, match="newer checkpoint-7"):
        train(load_recipe(run / "recipe.yaml", [f"resume={run / 'checkpoint-6'}"]))


def test_a_model_whose_sampling_settings_cannot_be_saved_is_saved_all_the_same(tmp_path, model_folder):
    """As in the folder of a chat model: a temperature without do_sample."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6, "top_p": 0.9}))
    assert train(tiny_recipe(tmp_path, copy, "train.max_steps=2", "save.every=1")) == 0
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9)


def test_an_evaluation_made_again_replaces_its_row(tmp_path, model_folder):
    settings = ("save.every=1", "train.max_steps=1")
    assert train(tiny_recipe(tmp_path, model_folder, *settings)) == 0
    assert (
        train(tiny_recipe(tmp_path, model_folder, *settings, "eval.loss_only=false", "eval.max_new_tokens=4"))
        == 0
    )
    (row,) = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    assert row["exact_match"] == 0.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft, of transformers
def test_lora_saves_adapters_and_evaluates_them(tmp_path, model_folder):
    recipe = tiny_recipe(
        tmp_path, model_folder, "lora.r=2", "lora.dropout=0.1", "train.activation_checkpointing=true"
    )
    assert train(recipe) == 0
    saved = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= saved
    assert "model.safetensors" not in saved
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    weights = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert any(value.abs().max() > 0 for value in weights), "the adapters were trained"
    logged = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row][-1]["eval_loss"]
    assert evaluate(str(tmp_path / "run"))["loss"] == pytest.approx(logged, rel=1e-5)


def test_lora_merged_is_a_plain_model_with_the_same_loss(tmp_path, model_folder):
    assert train(tiny_recipe(tmp_path, model_folder, "lora.r=2", "save.merge_lora=true", "eval.every=2")) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    rows = [row["eval_loss"] for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    assert evaluate(str(tmp_path / "run"))["loss"] == pytest.approx(rows[-1], rel=1e-4)


def test_packed_rows_train_and_evaluate_like_single_ones(tmp_path, model_folder):
    """Before the first step, packing changes nothing about the held-out loss."""
    settings = ("train.max_steps=2", "eval.at_start=true", "eval.max_batches=null", "save.model=false")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert train(tiny_recipe(tmp_path / "one", model_folder, *settings)) == 0
    assert train(tiny_recipe(tmp_path / "two", model_folder, *settings, "data.packing=true")) == 0
    plain, packed = (rows_of(tmp_path / name / "run")[0]["eval_loss"] for name in ("one", "two"))
    assert packed == pytest.approx(plain, rel=1e-4)


def test_bfloat16_with_the_plain_loss_and_no_clipping_trains(tmp_path, model_folder):
    settings = ("model.dtype=bfloat16", "train.loss=plain", "train.max_grad_norm=null", "data.eval=null")
    assert train(tiny_recipe(tmp_path, model_folder, *settings)) == 0
    assert (
        load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    )
