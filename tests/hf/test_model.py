"""load_model opens what can be trained, whole and in the right dtype, and explains everything else."""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.model import load_model
from lowmem.recipe.schema import ModelRecipe
from tests.hf.tiny_models import tiny_model
from tests.hf.tiny_tokenizer import tiny_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown_host(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def load(name: object, **settings: object) -> transformers.PreTrainedModel:
    return load_model(ModelRecipe(name_or_path=str(name), **{"dtype": "float32", **settings}), seed=0)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def problem(
    name: object, error: type[RecipeError] | type[RefusedError] = RecipeError, **settings: object
) -> str:
    with pytest.raises(error) as raised:
        load(name, **settings)
    text = str(raised.value)
    assert raised.value.exit_code == (2 if error is RecipeError else 4)
    assert "\n" not in text
    return text


# --- what works


def test_a_local_folder_is_loaded_bit_by_bit(folder: Path) -> None:
    before = torch.get_rng_state()
    model = load(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_arrive_in_the_dtype_of_the_recipe(folder: Path, stored: torch.dtype, dtype: str) -> None:
    edit_weights(folder, lambda weights: weights.update({name: w.to(stored) for name, w in weights.items()}))
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_of_the_recipe_is_used(folder: Path, attention: str) -> None:
    assert load(folder, attn=attention).config._attn_implementation == attention


def test_weights_in_several_files_are_loaded(folder: Path) -> None:
    expected = load(folder).state_dict()
    (folder / WEIGHTS).unlink()
    tiny_model().save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert all(torch.equal(w, expected[name]) for name, w in load(folder).state_dict().items())


def test_tied_weights_that_are_stored_once_are_not_missing(tmp_path: Path) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_causal_model_whose_configuration_does_not_say_decoder_is_accepted(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99
    )
    assert config.is_decoder is False
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert isinstance(load(tmp_path), transformers.GPTNeoXForCausalLM)


def test_weights_that_do_not_belong_to_the_model_are_left_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(2)}))
    load(folder)
    assert "1 weights" in caplog.text
    assert "value_head.weight" in caplog.text


def test_loading_prints_nothing_and_restores_transformers_own_logging(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.enable_progress_bar()
    before = logging.get_verbosity()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


# --- names that lead nowhere


def test_a_missing_folder_is_answered_with_the_nearest_name(folder: Path) -> None:
    text = problem(folder.parent / "lama")
    assert "there is no folder" in text
    assert f"Did you mean {folder}?" in text


@pytest.mark.parametrize("name", ["./nowhere", "~/no/such/model", "a/b/c", "runs\\x"])
def test_a_name_that_can_only_be_a_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    assert f"there is no folder {name}." in problem(name)


def test_a_name_inside_an_existing_folder_is_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "models").mkdir()
    assert "there is no folder models/x" in problem("models/x")


def test_a_file_is_answered_with_its_folder(folder: Path) -> None:
    assert "is a file. Name the folder that holds it" in problem(folder / WEIGHTS)


def test_a_hub_id_without_network_says_so_at_once() -> None:
    text = problem("some-org/some-model")
    assert "some-org/some-model is not a folder here and, as a Hugging Face id" in text
    assert "out of reach" in text


def test_an_impossible_id_is_named_as_such() -> None:
    assert "neither a folder here nor a possible Hugging Face id" in problem("my model")


def test_an_unknown_builtin_is_answered_with_the_known_one() -> None:
    assert "Did you mean builtin:tiny-llama?" in problem("builtin:llama")


# --- folders that hold no model


def test_a_folder_without_configuration_is_refused_with_a_hint(folder: Path) -> None:
    assert f"has no config.json. Did you mean {folder}?" in problem(folder.parent)
    (folder / "config.json").unlink()
    assert "A model folder has config.json beside its weights" in problem(folder)
    (folder / "model.gguf").touch()
    assert "GGUF files cannot be trained" in problem(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert "It holds LoRA adapters for org/base: name that model" in problem(folder)


def test_a_configuration_that_is_not_json_is_shown_with_its_line(folder: Path) -> None:
    (folder / "config.json").write_text('{\n"model_type": "llama",,\n}')
    assert f"{folder}/config.json:2 is not valid JSON" in problem(folder)
    (folder / "config.json").write_text("[1]")
    assert "holds a list where a JSON object is needed" in problem(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in problem(folder)


def test_a_configuration_with_an_impossible_value_is_explained(folder: Path) -> None:
    edit_config(folder, num_attention_heads="many")
    assert "num_attention_heads" in problem(folder)


def test_an_unknown_model_type_is_named(folder: Path) -> None:
    edit_config(folder, model_type="lllama")
    assert "of a model_type that this transformers does not know" in problem(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "holds no weights. A model folder has model.safetensors" in problem(folder)


def test_pickled_weights_are_refused_and_the_conversion_that_is_offered_works(folder: Path) -> None:
    expected = load(folder).state_dict()
    tiny_tokenizer(unk_token="<unk>").save_pretrained(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    text = problem(folder)
    assert "holds its weights only as pickles (pytorch_model.bin)" in text
    command = re.search(r'python -c "(.*)" and name', text)
    assert command is not None
    program = shlex.split(command.group(0).removesuffix(" and name"))[2]
    exec(program)
    assert (folder.parent / "llama-safetensors" / "tokenizer.json").is_file()
    converted = load(f"{folder}-safetensors").state_dict()
    assert all(torch.equal(converted[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "(0 bytes) is damaged or cut short"),
        (b"not safetensors at all, just text", "is damaged or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_a_damaged_file_of_weights_is_named(folder: Path, content: bytes, expected: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    text = problem(folder)
    assert expected in text
    assert str(folder / WEIGHTS) in text


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_truncated_file_of_weights_is_named(folder: Path, part: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(part * len(whole))])
    assert f"{folder / WEIGHTS} ({int(part * len(whole))} bytes) is damaged or cut short" in problem(folder)


def test_a_part_of_the_weights_that_is_not_there_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny_model().save_pretrained(folder, max_shard_size="8KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    text = problem(folder)
    assert re.search(r"lacks 1 of the \d+ files that model.safetensors.index.json lists: ", text)
    assert gone.name in text
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in problem(folder)


# --- models that do not fit


def test_a_weight_that_would_start_at_random_is_an_error(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    text = problem(folder)
    assert "lacks 1 of the weights of LlamaForCausalLM (model.layers.0.self_attn.q_proj.weight)" in text


def test_a_model_without_its_output_layer_is_an_error(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    assert "lm_head.weight" in problem(tmp_path)


def test_weights_of_another_shape_are_shown_with_both_shapes(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(7, 16)}))
    assert "lm_head.weight is (7, 16), not (199, 16)" in problem(folder)


def test_a_model_that_brings_its_own_code_needs_permission(folder: Path) -> None:
    edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    text = problem(folder)
    assert "Python code of its own" in text
    assert "model.trust_remote_code: true" in text
    with pytest.raises(SystemExit, match="the code ran"):
        load(folder, trust_remote_code=True)


def test_own_code_that_is_not_needed_is_not_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    assert isinstance(load(folder), LlamaForCausalLM)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


BART = {
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Bert MaskedLM", "is bert, an encoder that sees the tokens to be predicted"),
        ("ViT ImageClassification", "is vit (ViTForImageClassification)"),
        ("T5 ConditionalGeneration", "is t5 (T5ForConditionalGeneration)"),
        ("Bart ConditionalGeneration", "an encoder with a decoder"),
    ],
)
def test_models_that_are_not_causal_language_models_are_refused(
    tmp_path: Path, model: str, expected: str
) -> None:
    family, task = model.split()
    sizes = {
        "Bert": {**SMALL, "vocab_size": 99},
        "ViT": SMALL,
        "T5": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99, "d_kv": 8},
        "Bart": {"d_model": 16, "vocab_size": 99, "encoder_layers": 1, "decoder_layers": 1, **BART},
    }[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{family}For{task}")(config).save_pretrained(tmp_path)
    text = problem(tmp_path)
    assert expected in text
    assert "lowmem trains causal language models" in text


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "stored quantised (gptq) and cannot be trained" in problem(folder)


# --- attention that is not there


def test_flash_attention_without_a_gpu_names_the_nearest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = problem(folder, RefusedError, attn="flash_attention_2")
    assert "needs a CUDA device" in text
    assert "Use model.attn: sdpa" in text


def test_flash_attention_without_its_package_names_the_install_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = problem(folder, RefusedError, attn="flash_attention_2")
    assert "pip install flash-attn --no-build-isolation" in text


def test_attention_that_the_model_does_not_have_names_the_nearest(tmp_path: Path) -> None:
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=99)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    text = problem(tmp_path, RefusedError, attn="sdpa")
    assert "model.attn: sdpa does not exist for" in text
    assert "Use model.attn: eager" in text
