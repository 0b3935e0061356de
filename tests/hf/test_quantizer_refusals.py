"""Int8 folders and settings that are wrong, told when they are loaded or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf import Int8Config
from tests.hf.test_quantizer import WEIGHTS, int8_folder, load


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


def flip(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{UP}.weight_scales"), f"{UP}.weight_scales is missing"),
        (lambda tensors: tensors.pop(f"{UP}.weight_codes"), f"{UP}.weight_codes is missing"),
        (
            lambda tensors: flip(tensors, f"{UP}.weight_codes"),
            r"weight_codes in .* is \(16, 24\), not \(24, 16\)",
        ),
        (
            lambda tensors: flip(tensors, f"{UP}.weight_scales"),
            r"weight_scales in .* is \(2, 24\), not \(24, 2\)",
        ),
        (
            lambda tensors: tensors.update({f"{UP}.weight_codes": tensors[f"{UP}.weight_codes"].float()}),
            f"{UP}.weight_codes in .* is of F32, not of I8",
        ),
        (
            lambda tensors: tensors.update(
                {f"{UP}.weight_scales": tensors[f"{UP}.weight_scales"].bfloat16()}
            ),
            f"{UP}.weight_scales in .* is of BF16, not of F32",
        ),
        (
            lambda tensors: tensors[f"{UP}.weight_scales"].fill_(float("nan")),
            f"{UP}.weight_scales holds values that are not finite",
        ),
    ],
    ids=[
        "no scales",
        "no codes",
        "codes flipped",
        "scales flipped",
        "float codes",
        "bf16 scales",
        "nan scales",
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, said):
    folder = int8_folder(tmp_path)
    edit(folder, change)
    with pytest.raises(RecipeError, match=said):
        load(folder)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    folder = int8_folder(tmp_path)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecipeError, match=rf"{file} is damaged or cut short"):
        load(folder)


def test_groups_of_another_size_than_the_configuration_says_are_named(tmp_path):
    folder = int8_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"weight_scales in .* is \(\d+, \d\), not"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 0}, "group_size is 0; it must be a whole number of at least 1"),
        ({"group_size": 2.5}, r"group_size is 2\.5; it must be a whole number"),
        ({"scale_dtype": "float16"}, "scale_dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"modules_to_not_convert": "lm_head"}, r"write \['lm_head'\]"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_written(settings, said):
    with pytest.raises(ValueError, match=said):
        Int8Config(**settings)


def test_parts_on_several_devices_are_refused(tmp_path):
    folder = int8_folder(tmp_path)
    with pytest.raises(RefusedError, match="Name one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "disk", "lm_head": "cpu"})
