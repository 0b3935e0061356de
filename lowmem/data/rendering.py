"""A template at work: messages in, text out, through the tokenizer's own Jinja sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowmem.data.bad_rows import RowError
from lowmem.data.formats import Message
from lowmem.data.templates import template_source
from lowmem.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The template `name` (as in `data.template`) for one tokenizer.

    `source` is its Jinja text and may be set as `tokenizer.chat_template`. Raises RecipeError for an
    unknown name, an unreadable file, or Jinja that does not parse.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        from jinja2 import TemplateSyntaxError

        self.name, self.source = template_source(name, tokenizer)
        self.tokenizer = tokenizer
        self.swallowing_tokens = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip
        ]
        self.marks_answers = _GENERATION_TAG.search(self.source) is not None
        try:
            self.render([{"role": "user", "content": "Hello"}], generation_prompt=True)
        except RowError as problem:
            # a template may well refuse this conversation; only one that cannot be parsed is wrong for all
            if isinstance(problem.__cause__, TemplateSyntaxError):
                error = problem.__cause__
                raise RecipeError(
                    f"data.template: {self.name}:{error.lineno}: not a valid Jinja template: {error.message}"
                ) from error

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The whole conversation as text; RowError when the template refuses it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise self._refusal(error) from error

    def render_with_marks(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character ranges of its `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as a str, but returns texts and ranges
        try:
            texts, marks = render(
                conversations=[list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise self._refusal(error) from error
        return str(texts[0]), [(int(start), int(end)) for start, end in marks[0]]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that waits for its answer, for generation."""
        text = self.render(messages, generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _refusal(self, error: Exception) -> RowError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return RowError(f"the template {self.name} cannot render it: {reason}")
