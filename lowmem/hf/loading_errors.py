"""What transformers and the Hub raise while a model or tokenizer is opened, as one paragraph for the user."""

from __future__ import annotations

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lowmem.errors import LowMemError, RecipeError, RefusedError
from lowmem.hf.model_folder import KEY
from lowmem.recipe.schema import ModelRecipe


def explain(error: Exception, recipe: ModelRecipe, *, is_local: bool) -> LowMemError:
    """The error to raise in place of `error`, which opening what `recipe` names has raised."""
    name, text = recipe.name_or_path, str(error)
    if not is_local:
        reason = _hub_reason(error, recipe)
        if reason is not None:
            return RecipeError(f"{KEY}: {reason}")
    if "trust_remote_code" in text:
        return RecipeError(
            f"{KEY}: {name} comes with Python code of its own that has to run before it can be loaded. Read that "
            "code; if you trust it, set model.trust_remote_code: true."
        )
    if "does not recognize this architecture" in text or "Should have a `model_type`" in text:
        return RecipeError(
            f"{KEY}: {name} is of a model_type that this transformers does not know, or names none in its "
            "config.json. Check config.json, or install a newer transformers."
        )
    if "does not support" in text and ("attn_implementation" in text or "ttention" in text):
        nearest = "sdpa" if recipe.attn == "flash_attention_2" else "eager"
        return RefusedError(
            f"model.attn: {recipe.attn} does not exist for {name}. Use model.attn: {nearest}."
        )
    if "safetensors" in text and isinstance(error, OSError):
        return RecipeError(
            f"{KEY}: {name} offers no safetensors weights, and lowmem reads no pickles, which can run any program "
            "hidden in them. Choose another revision or copy of the model, or convert it and name the folder."
        )
    summary = " ".join(text.split())
    return RecipeError(f"{KEY}: {name} cannot be loaded ({type(error).__name__}: {summary[:400]}).")


def _hub_reason(error: Exception, recipe: ModelRecipe) -> str | None:
    name = recipe.name_or_path
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(found, kinds) for found in causes)

    if has(HFValidationError):
        return f"{name!r} is neither a folder here nor a possible Hugging Face id (namespace/name)."
    if has(GatedRepoError):
        return (
            f"{name} asks for its licence to be accepted on huggingface.co, and for a login: hf auth login."
        )
    if has(RepositoryNotFoundError):
        return f"{name} is neither a folder here nor a model on huggingface.co that you may see."
    if has(RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {recipe.revision} (model.revision)."
    if has(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) or "couldn't connect" in str(
        error
    ):
        return (
            f"{name} is not a folder here and, as a Hugging Face id, is not in the local cache and cannot be "
            "downloaded: huggingface.co is out of reach. Check the name, or copy the model here and name its folder."
        )
    return None
