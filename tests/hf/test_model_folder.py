"""A folder that is no model, or a damaged one, is explained before anything is loaded."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.model_folders import WEIGHTS, edit_config, llama_folder, load, problem
from tests.hf.tiny_models import tiny_model
from tests.hf.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path)


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
