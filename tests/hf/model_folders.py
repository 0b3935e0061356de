"""Model folders for tests to break, and the one paragraph that breaking them gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.model import load_model
from lowmem.recipe.schema import ModelRecipe
from tests.hf.tiny_models import tiny_model

WEIGHTS = "model.safetensors"


def llama_folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def load(name: object, **settings: object) -> PreTrainedModel:
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
