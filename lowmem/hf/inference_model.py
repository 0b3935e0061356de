"""The model a run has trained, or the untrained one of a recipe, for evaluation and generation."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem.errors import RecipeError
from lowmem.hf.model import load_model, load_tokenizer
from lowmem.hf.model_folder import CONFIG, read_config
from lowmem.hf.run_folder import RunFolder
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import ModelRecipe, Recipe
from lowmem.run.checkpoint import verify
from lowmem.run.checkpoint_manifest import DamagedError

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe


def load_for_inference(target: str, overrides: Sequence[str]) -> LoadedModel:
    """The final model of the run folder `target`, or of a recipe the model before training.

    A run without a final model gives its newest checkpoint, said on stderr. Raises RecipeError when there
    is neither, and for everything that is wrong with the recipe or the overrides.
    """
    folder = RunFolder(Path(target))
    if not folder.path.is_dir():
        recipe = load_recipe(target, overrides)
        return _on_device(
            load_model(recipe.model, seed=recipe.train.seed), load_tokenizer(recipe.model), recipe
        )
    if not folder.recipe.is_file():
        raise RecipeError(
            f"{folder.path} is not a run folder: it holds no recipe.yaml. Name a run folder or a recipe."
        )
    recipe = load_recipe(folder.recipe, overrides, files_must_exist=False)
    weights = trained_weights(folder)
    if (weights / ADAPTER_CONFIG).is_file():
        model = _with_adapters(load_model(recipe.model, seed=recipe.train.seed), weights)
        return _on_device(model, load_tokenizer(_at(recipe.model, weights)), recipe)
    local = _at(recipe.model, weights)
    return _on_device(load_model(local, seed=recipe.train.seed), load_tokenizer(local), recipe)


def trained_weights(folder: RunFolder) -> Path:
    """<run>/model, else the newest checkpoint; RecipeError when the run has saved neither."""
    if folder.model.is_dir():
        return folder.model
    newest = folder.newest_checkpoint()
    _tell_what_is_passed_over(folder, newest)
    if newest is None:
        raise RecipeError(
            f"{folder.path} holds neither a final model nor a checkpoint. Train it to the end with save.model: true "
            "(lowmem train), or name a recipe to look at the model before training."
        )
    try:
        verify(newest)
    except DamagedError as damage:
        raise RecipeError(
            f"{newest} is damaged: {damage} lowmem train goes on from the last good one."
        ) from damage
    print(f"{folder.path} has no final model yet; using {newest.name}", file=sys.stderr)
    return newest


def _tell_what_is_passed_over(folder: RunFolder, chosen: Path | None) -> None:
    for newer in reversed(folder.checkpoints()):
        if newer == chosen:
            return
        try:
            verify(newer, checksums=False)
        except DamagedError as damage:
            print(f"{newer} is damaged and passed over: {damage}", file=sys.stderr)


def _with_adapters(base: PreTrainedModel, adapters: Path) -> PeftModel:
    with warnings.catch_warnings():
        # peft asks for a property by the name that newer transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        try:
            return PeftModel.from_pretrained(base, str(adapters))
        except (RuntimeError, ValueError) as error:
            name = base.config.name_or_path or "this model"
            raise RecipeError(
                f"model.name_or_path: the adapters in {adapters} do not fit {name}: "
                f"{' '.join(str(error).split())[:300]} Name the model that they were trained on."
            ) from error


def _at(model: ModelRecipe, weights: Path) -> ModelRecipe:
    """`model` as it is stored in the folder `weights`."""
    quantization = read_config(weights).get("quantization_config") if (weights / CONFIG).is_file() else None
    return replace(
        model, name_or_path=str(weights), revision=None, weights="bf16" if quantization is None else "int8"
    )


def _on_device(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> LoadedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # a decorated method
    return LoadedModel(model.eval(), tokenizer, recipe)
