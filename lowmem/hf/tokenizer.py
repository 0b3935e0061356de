"""Open the tokenizer that belongs to a recipe's model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from lowmem.errors import RecipeError
from lowmem.hf.hub import hub_has_an_address
from lowmem.hf.loading_errors import explain
from lowmem.hf.model_folder import BUILTIN_PREFIX, CONFIG, KEY, check_builtin, local_folder, read_config
from lowmem.hf.quiet import quiet_transformers
from lowmem.recipe.schema import ModelRecipe

# fmt: off
FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenization.py",
)
# fmt: on


def load_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of `recipe.name_or_path`, with a pad token that is one of its own tokens.

    The pad token is the one it has, else its unknown token, else its end-of-text token: padding carries no
    loss and is not attended to, so no row has to be added to the embedding for it.

    Raises RecipeError when there are no tokenizer files, when they cannot be read, when they hold more ids than
    the model's embedding has rows, or when no token can serve for padding.
    """
    if recipe.name_or_path.startswith(BUILTIN_PREFIX):
        check_builtin(recipe.name_or_path)
        from lowmem.hf.builtin_model import character_tokenizer, tiny_llama_config

        tokenizer: PreTrainedTokenizerBase = character_tokenizer()
        _set_pad_token_(tokenizer, recipe)
        _check_rows(tokenizer, tiny_llama_config().vocab_size, recipe)
        return tokenizer

    folder = local_folder(recipe.name_or_path)
    if folder is not None and not any((folder / name).is_file() for name in FILES):
        raise RecipeError(
            f"{KEY}: {folder} has no tokenizer: none of {', '.join(FILES[:6])} is there. Copy the tokenizer "
            "files of the model beside its weights."
        )
    # Adapters are saved with the tokenizer, but without a configuration.
    has_config = folder is None or (folder / CONFIG).is_file()
    if folder is not None and has_config:
        read_config(folder)
    name = recipe.name_or_path if folder is None else str(folder)
    where: dict[str, Any] = {
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
        "local_files_only": folder is None and not hub_has_an_address(),
    }
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            config = AutoConfig.from_pretrained(name, **where) if has_config else None
    except MemoryError:
        raise
    # The tokenizers library raises bare Exception for a malformed file.
    except Exception as error:
        raise explain(error, recipe, is_local=folder is not None) from error
    _set_pad_token_(tokenizer, recipe)
    if config is not None:
        _check_rows(tokenizer, config.get_text_config().vocab_size, recipe)
    return tokenizer


def _set_pad_token_(tokenizer: PreTrainedTokenizerBase, recipe: ModelRecipe) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RecipeError(
            f"{KEY}: the tokenizer of {recipe.name_or_path} has no pad_token, unk_token or eos_token, so nothing "
            "can fill up short rows. Name one of its tokens as pad_token in tokenizer_config.json."
        )


def _check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, recipe: ModelRecipe) -> None:
    outside = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if outside:
        first = ", ".join(f"{token!r} = {id}" for id, token in outside[:3])
        raise RecipeError(
            f"{KEY}: the tokenizer of {recipe.name_or_path} has {len(outside)} tokens whose ids are beyond the "
            f"{rows} rows of the model's embedding ({first}). Use the tokenizer that the model was trained with, or "
            "enlarge the model first with its resize_token_embeddings."
        )
