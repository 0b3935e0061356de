"""load_model opens what is whole, in the right dtype, and explains names that lead nowhere."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tests.hf.model_folders import WEIGHTS, edit_weights, llama_folder, load, problem
from tests.hf.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown_host(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux' account of memory")
@pytest.mark.parametrize(("dtype", "copied"), [("float32", 0.0), ("bfloat16", 0.5)])
def test_files_in_the_dtype_of_the_recipe_are_mapped_so_that_processes_share_their_memory(
    tmp_path: Path, dtype: str, copied: float
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=2,
            num_attention_heads=8,
        )
    )
    model.save_pretrained(tmp_path / "wide")
    nbytes = 4 * sum(param.numel() for param in model.parameters())
    before = own_bytes()
    loaded = load(tmp_path / "wide", dtype=dtype)
    assert abs(own_bytes() - before - copied * nbytes) < 0.2 * nbytes
    assert sum(param.numel() for param in loaded.parameters()) == nbytes // 4


def own_bytes() -> int:
    """Memory of this process that no other shares, files apart."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    ]
    return 1024 * int(line.split()[1])


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
