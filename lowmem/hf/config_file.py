"""A model's config.json as it is written, without torch or transformers: all that a plan by formula needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowmem.hf.builtin_config import TINY_LLAMA
from lowmem.hf.model_folder import BUILTIN_PREFIX, CONFIG, check_builtin, local_folder, read_config
from lowmem.recipe.schema import ModelRecipe


def config_file(recipe: ModelRecipe) -> dict[str, Any]:
    """config.json of `recipe.name_or_path`; of a Hub id only this file is fetched.

    Raises RecipeError where there is none.
    """
    if recipe.name_or_path.startswith(BUILTIN_PREFIX):
        check_builtin(recipe.name_or_path)
        return dict(TINY_LLAMA)
    folder = local_folder(recipe.name_or_path)
    if folder is not None:
        return read_config(folder)
    from huggingface_hub import hf_hub_download

    from lowmem.hf.hub import hub_has_an_address
    from lowmem.hf.loading_errors import explain

    try:
        path = hf_hub_download(
            recipe.name_or_path, CONFIG, revision=recipe.revision, local_files_only=not hub_has_an_address()
        )
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # what the Hub's client raises is explained in one place
        raise explain(error, recipe, is_local=False) from error
