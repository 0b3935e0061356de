"""Where a generated answer ends: at the tokens or the text that the model was trained to end answers with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem.data.bad_rows import RowError
from lowmem.data.rendering import ChatTemplate
from lowmem.data.turns import rendered
from lowmem.recipe.schema import DataRecipe


@dataclass(frozen=True)
class AnswerEnd:
    """An answer ends at any of `tokens`, or where `text` begins (None: at tokens only)."""

    tokens: list[int]
    text: str | None

    def cut(self, answer: str) -> str:
        return answer if self.text is None else answer.partition(self.text)[0]


def answer_end(data: DataRecipe, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> AnswerEnd:
    """The tokenizer's end token, those of the model's own generation settings, and the template's end of a
    turn: as a token where the tokenizer knows it as one, else as text."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    tokens = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    text = None if data.train.format == "text" else turn_end(ChatTemplate(data.template, tokenizer))
    if text:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            tokens.add(ids[0])
            text = None
    return AnswerEnd(sorted(token for token in tokens if token is not None), text or None)


def turn_end(template: ChatTemplate) -> str:
    """What `template` writes behind an answer; empty where it cannot render a short conversation."""
    answer = "answer of the probe"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        found = rendered(template, messages, only_last=True)
    except RowError:
        return ""
    turn = found.turns[-1]
    return found.text[turn.start : turn.end].partition(answer)[2].strip()
