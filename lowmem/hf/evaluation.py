"""Evaluate a run, or a recipe's model before training, on the recipe's held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem.data.batches import TokenDataset, collate
from lowmem.data.prepare import Prepared, prepare
from lowmem.errors import RecipeError
from lowmem.hf.answer_end import answer_end
from lowmem.hf.held_out import exact_match, held_out_loss, never, perplexity
from lowmem.hf.inference_model import load_for_inference
from lowmem.recipe.schema import Recipe

Metrics = dict[str, float | None]


class HeldOut:
    """The held-out rows of a recipe, as many as its `eval` section asks for."""

    def __init__(self, recipe: Recipe, prepared: Prepared, tokenizer: PreTrainedTokenizerBase):
        self.recipe, self.data = recipe.eval, recipe.data
        self.tokenizer = tokenizer
        self.batch_size = recipe.eval.batch_size or recipe.train.per_device_batch_size
        wanted = None if recipe.eval.max_batches is None else recipe.eval.max_batches * self.batch_size
        rows = TokenDataset(prepared.examples[:wanted])
        self.rows = [rows[index] for index in range(len(rows))]
        self.questions = prepared.questions[: recipe.eval.max_answers]
        assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
        self.collate = collate(tokenizer.pad_token_id)

    def loss(self, model: nn.Module, should_stop: Callable[[], bool] = never) -> tuple[float, int] | None:
        """(mean loss, trained tokens); None when interrupted."""
        return held_out_loss(
            model, self.rows, self.collate, batch_size=self.batch_size, should_stop=should_stop
        )

    def exact_match(self, model: nn.Module, should_stop: Callable[[], bool] = never) -> float | None:
        """Part of the answers generated exactly; None without questions, or when interrupted."""
        return exact_match(
            model,
            self.tokenizer,
            self.questions,
            end=answer_end(self.data, self.tokenizer, model),
            batch_size=self.batch_size,
            max_new_tokens=self.recipe.max_new_tokens,
            should_stop=should_stop,
        )

    def metrics(self, model: nn.Module, should_stop: Callable[[], bool] = never) -> Metrics | None:
        """A row of metrics.jsonl; None when interrupted."""
        measured = self.loss(model, should_stop)
        if measured is None:
            return None
        matched = None if self.recipe.loss_only else self.exact_match(model, should_stop)
        if should_stop():
            return None
        return {"eval_loss": measured[0], "eval_perplexity": perplexity(measured[0]), "exact_match": matched}


def evaluate(target: str, overrides: Sequence[str] = ()) -> Metrics:
    """{"loss", "perplexity", "tokens", "exact_match"} of a run folder's model, or of a recipe's untrained one.

    loss is nats per trained token; exact_match is None where the rows hold no questions (format text).
    Raises RecipeError when the recipe names no held-out rows.
    """
    loaded = load_for_inference(target, overrides)
    recipe = loaded.recipe
    if recipe.data.eval is None:
        raise RecipeError(
            "data.eval: the recipe names no held-out rows. Add them on the command line, for example "
            "data.eval.path=held_out.jsonl data.eval.format=prompt_response"
        )
    prepared = prepare(
        recipe.data.eval, recipe.data, loaded.tokenizer, seed=recipe.train.seed, where="data.eval"
    )
    held_out = HeldOut(recipe, prepared, loaded.tokenizer)
    measured = held_out.loss(loaded.model)
    assert measured is not None, "only an interrupt ends an evaluation early"
    loss, tokens = measured
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": tokens,
        "exact_match": held_out.exact_match(loaded.model),
    }
