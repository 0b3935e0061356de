"""Labels that train answers and nothing else, proven by decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem.data.bad_rows import RowError
from lowmem.data.example import IGNORED, Example
from lowmem.data.pieces import PieceTokenizer
from lowmem.data.turns import Rendered


@dataclass(frozen=True)
class Masked:
    """A whole conversation in tokens, before any cutting to length."""

    example: Example
    prompt_ids: list[int]  # everything before the last answer
    answer: str  # the last answer


def masked(
    tokenizer: PieceTokenizer,
    conversations: Sequence[Rendered],
    train_on: Literal["assistant", "last_turn", "all"],
) -> list[Masked | RowError]:
    """Tokens and labels of each conversation, or why its labels would be wrong.

    Trained are the tokens of `turns`, or every token under `all`; never the first one, which nothing
    predicts. A RowError means that the trained tokens do not decode to the text of the answers.
    """
    found: list[Masked | RowError] = []
    texts = [_pieces(conversation, whole=train_on == "all") for conversation in conversations]
    for conversation, pieces, ids in zip(conversations, texts, tokenizer.cut(texts), strict=True):
        try:
            found.append(_masked(tokenizer, conversation, pieces, ids, train_on))
        except RowError as problem:
            found.append(problem)
    return found


def _pieces(conversation: Rendered, *, whole: bool) -> list[str]:
    """Text before an answer, and answer, in turn. What follows the last answer trains nothing: left out."""
    text, pieces, position = conversation.text, [], 0
    for turn in conversation.turns:
        pieces += [text[position : turn.start], text[turn.start : turn.end]]
        position = turn.end
    if whole and text[position:]:
        pieces.append(text[position:])
    return pieces


def _masked(
    tokenizer: PieceTokenizer, conversation: Rendered, pieces: list[str], ids: list[list[int]], train_on: str
) -> Masked:
    input_ids: list[int] = []
    labels: list[int] = []
    last_prompt = 2 * len(conversation.turns) - 1
    for number, (text, piece_ids) in enumerate(zip(pieces, ids, strict=True)):
        is_answer = number % 2 == 1
        if is_answer:
            _check_decoded(tokenizer, input_ids, piece_ids, text)
        if number == last_prompt:
            prompt_length = len(input_ids)
        input_ids += piece_ids
        labels += piece_ids if is_answer or train_on == "all" else [IGNORED] * len(piece_ids)
    if labels:
        labels[0] = IGNORED
    return Masked(Example(input_ids, labels), input_ids[:prompt_length], conversation.turns[-1].answer)


def _check_decoded(tokenizer: PieceTokenizer, before: list[int], ids: list[int], text: str) -> None:
    """Raise RowError unless `ids`, read behind the tokens before them, are `text`."""
    lead = tokenizer.text(before[-1:])
    found = tokenizer.text(before[-1:] + ids)
    if "\ufffd" in lead:  # the token before is a part of a character
        lead = tokenizer.text(before)
        found = tokenizer.text(before + ids)
    if found == lead + text:
        return
    found = found[len(lead) :]
    if found == f" {text}" and tokenizer.follows_special(lead):
        return  # the space such tokenizers put behind an added token, in every prompt too
    kept = tokenizer.text(tokenizer.ids([text])[0]).lstrip(" ")  # some decoders drop a first space
    if kept != text.lstrip(" ") and found.lstrip(" ") == kept:
        return  # the tokenizer loses something of this text anywhere (unknown characters, Unicode forms)
    raise RowError(
        f"the trained tokens would read {found[:60]!r} and not {text[:60]!r}, the answer; "
        "the tokenizer does not keep this text"
    )
