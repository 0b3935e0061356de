"""Answers of a trained model, token by token as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem.data.bad_rows import RowError
from lowmem.data.rendering import ChatTemplate
from lowmem.errors import RecipeError
from lowmem.hf.answer_end import AnswerEnd, answer_end
from lowmem.hf.inference_model import load_for_inference

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Generator:
    """The model of the run folder or recipe `target`, loaded once; `overrides` as on the command line.

    Raises RecipeError when there is no model to load.
    """

    def __init__(self, target: str, overrides: Sequence[str] = ()):
        loaded = load_for_inference(target, overrides)
        self.model, self.tokenizer, self.data = loaded.model, loaded.tokenizer, loaded.recipe.data
        self.end = answer_end(self.data, self.tokenizer, self.model)
        self.seed = loaded.recipe.train.seed

    def prompt_ids(self, prompt: str) -> list[int]:
        """`prompt` as the model saw prompts in training: in the template, or plain for format text."""
        if self.data.train.format == "text":
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            try:
                ids = ChatTemplate(self.data.template, self.tokenizer).prompt_ids(
                    [{"role": "user", "content": prompt}]
                )
            except RowError as problem:
                raise RecipeError(f"data.template: the prompt cannot be written: {problem}") from problem
        if not ids:
            raise RecipeError("the prompt is empty; write at least one character.")
        return ids

    def stream(self, prompt: str, *, max_new_tokens: int = 256, temperature: float = 0.0) -> Iterator[str]:
        """Pieces of the answer, which joined are the whole. temperature 0 takes the likeliest token."""
        if not temperature >= 0:
            raise RecipeError(f"temperature is {temperature}; it must be 0 or more.")
        ids = self.prompt_ids(prompt)
        return streamed_text(self._tokens(ids, max_new_tokens, temperature), self.tokenizer, self.end)

    def _tokens(self, prompt_ids: list[int], max_new_tokens: int, temperature: float) -> Iterator[int]:
        device = next(self.model.parameters()).device
        random = torch.Generator(device=device).manual_seed(self.seed)
        seen = torch.tensor([prompt_ids], device=device)
        inputs, cache = seen, None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                outputs = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
                token = chosen_token(outputs.logits[0, -1], temperature, random)
            if int(token) in self.end.tokens:
                return
            yield int(token)
            seen = torch.cat([seen, token.reshape(1, 1)], dim=1)
            cache = outputs.get("past_key_values")
            # A model that keeps its memory elsewhere reads everything again: slow, but right.
            inputs = seen if cache is None else token.reshape(1, 1)


def chosen_token(
    logits: Tensor,  # (V,)
    temperature: float,
    random: torch.Generator,
) -> Tensor:
    """The likeliest token at temperature 0, otherwise one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial(torch.softmax(logits.float() / temperature, dim=-1), 1, generator=random)[0]


def streamed_text(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase, end: AnswerEnd) -> Iterator[str]:
    """The text that each token adds.

    A token may be part of a character, and its text may depend on the token before it (a leading blank).
    So each piece is what decoding gains when a token joins the ones before it, back to the last piece.
    What might be the beginning of `end.text` is held back until that is decided.
    """
    ids: list[int] = []
    context, settled = 0, 0  # ids[context:settled] is the last piece, ids[settled:] is not out yet
    held = ""
    for token in tokens:
        ids.append(token)
        before, after = decoded(tokenizer, ids[context:settled]), decoded(tokenizer, ids[context:])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            continue
        context, settled = settled, len(ids)
        held += after[len(before) :]
        if end.text is not None and end.text in held:
            break
        ready = len(held) - overlap(held, end.text or "")
        if ready:
            yield held[:ready]
            held = held[ready:]
    else:
        before, after = decoded(tokenizer, ids[context:settled]), decoded(tokenizer, ids[context:])
        held += after[len(before) :]
    if end.cut(held):
        yield end.cut(held)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` begin `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
