"""What a user should know once about a template and a tokenizer that were not made for each other."""

from __future__ import annotations

import re

from lowmem.data.rendering import ChatTemplate
from lowmem.data.templates import adds_bos
from lowmem.data.turns import Rendered

_SPECIAL_LOOKING = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>")


def template_notes(template: ChatTemplate, conversation: Rendered) -> list[str]:
    """Remarks on marks the tokenizer lacks, a missing beginning token and a missing end of the answer."""
    tokenizer = template.tokenizer
    marks = dict.fromkeys(_SPECIAL_LOOKING.findall(template.source))
    split = [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False)["input_ids"]) != 1]
    notes = []
    if split:
        notes.append(
            f"data.template: {template.name} uses {', '.join(split)}, which this tokenizer does not know as "
            "one token; written as ordinary text, that works and costs a few tokens a turn."
        )
    if adds_bos(tokenizer) and not conversation.text.startswith(str(tokenizer.bos_token)):
        notes.append(
            f"data.template: {template.name} does not begin with {tokenizer.bos_token}, which this tokenizer "
            "puts before every other text; conversations are trained without it, as the template says."
        )
    if not conversation.ends:
        eos = tokenizer.eos_token
        cure = (
            f"{eos} was added." if eos else "the model cannot learn to stop (there is no end-of-text token)."
        )
        notes.append(f"data.template: {template.name} puts nothing behind an answer; {cure}")
    return notes
