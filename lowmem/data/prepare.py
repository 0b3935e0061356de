"""From a recipe's data section to sequences of tokens: read, convert, render, mask, cut, pack."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowmem.data.bad_rows import BadRows, RowError
from lowmem.data.documents import chunked_documents
from lowmem.data.example import Example, Question
from lowmem.data.formats import Message, conversation, document
from lowmem.data.lengths import last_tokens, shortened
from lowmem.data.masking import masked
from lowmem.data.packing import packed
from lowmem.data.pieces import PieceTokenizer
from lowmem.data.preview import preview
from lowmem.data.rendering import ChatTemplate
from lowmem.data.sources import Row, read_rows
from lowmem.data.template_notes import template_notes
from lowmem.data.turns import Rendered, rendered
from lowmem.recipe.schema import DataRecipe, SourceRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ROWS_AT_A_TIME = 256  # as many go to the tokenizer in one call


@dataclass(frozen=True)
class Prepared:
    """Sequences ready for training.

    `summary` counts rows (read), skipped (bad), dropped and truncated (too long), sequences, and their
    tokens and trained_tokens, padding not counted. `sample` shows the first document, its trained part in
    [[[ ]]]. `template` is the Jinja source in use, for `tokenizer.chat_template`; None for format text.
    `notes` are remarks for the log; they have been logged as warnings already.
    """

    examples: list[Example]
    questions: list[Question]
    summary: dict[str, int]
    sample: str
    template: str | None
    notes: list[str]


@dataclass
class _Counted:
    documents: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    unknown: int = 0  # rows whose trained tokens hold the token for unknown characters


def prepare(
    source: SourceRecipe,
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    where: str,
) -> Prepared:
    """Everything training needs from `source` under the settings of `data`.

    `where` is the section's name in messages, data.train or data.eval. The same seed gives the same
    sequences in the same order. Raises RecipeError for anything wrong with the source, its rows or the
    template, and RefusedError for a tokenizer whose answers cannot be told from prompts.
    """
    rows = read_rows(source, seed=seed, where=where)
    bad = BadRows(data.on_bad_row, where)
    pieces = PieceTokenizer(tokenizer)
    format = source.format or "prompt_response"  # what the generators write
    if format == "text":
        template = None
        found = _texts(rows, data, pieces, bad)
    else:
        template = ChatTemplate(data.template, tokenizer)
        found = _conversations(rows, format, data, template, pieces, bad)
    bad.stop_if_nothing_is_left(len(found.documents), found.dropped, data.max_length)

    for note in found.notes:
        log.warning("%s", note)
    examples = found.documents
    if data.packing:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        examples = packed(found.documents, data.max_length, pad, seed)
    summary = {
        "rows": len(rows),
        "skipped": bad.count,
        "dropped": found.dropped,
        "truncated": found.truncated,
        "tokens": sum(len(example.input_ids) for example in found.documents),
        "trained_tokens": sum(example.trained_tokens for example in examples),
        "sequences": len(examples),
    }
    return Prepared(
        examples=examples,
        questions=found.questions,
        summary=summary,
        sample=preview(found.documents[0], pieces),
        template=template.source if template else None,
        notes=found.notes,
    )


def _texts(rows: list[Row], data: DataRecipe, pieces: PieceTokenizer, bad: BadRows) -> _Counted:
    places: list[str] = []
    texts: list[str] = []
    for row in rows:
        try:
            texts.append(document(_value(row)))
            places.append(row.place)
        except RowError as problem:
            bad.add(row.place, str(problem))
    bad.stop_if_any()
    found = _Counted()
    for start in range(0, len(texts), ROWS_AT_A_TIME):
        chunks = chunked_documents(pieces, texts[start : start + ROWS_AT_A_TIME], data.max_length)
        for place, documents in zip(places[start:], chunks, strict=False):
            found.documents += documents
            if not documents:
                bad.add_untrainable(place, "the text is a single token, so there is nothing to predict")
    bad.stop_if_any()
    bad.stop_if_too_many_untrainable(len(texts))
    return found


def _conversations(
    rows: list[Row],
    format: str,
    data: DataRecipe,
    template: ChatTemplate,
    pieces: PieceTokenizer,
    bad: BadRows,
) -> _Counted:
    wellformed: list[tuple[str, list[Message]]] = []
    for row in rows:
        try:
            wellformed.append((row.place, conversation(_value(row), format)))
        except RowError as problem:
            bad.add(row.place, str(problem))
    bad.stop_if_any()
    found = _Counted()
    for start in range(0, len(wellformed), ROWS_AT_A_TIME):
        _add_masked(wellformed[start : start + ROWS_AT_A_TIME], data, template, pieces, bad, found)
    bad.stop_if_any()
    bad.stop_if_too_many_untrainable(len(wellformed))
    if found.unknown:
        found.notes.append(
            f"{bad.where}: {found.unknown} answers hold characters that the tokenizer does not know; the "
            f"model is trained to write {pieces.tokenizer.unk_token} for them."
        )
    return found


def _add_masked(
    conversations: list[tuple[str, list[Message]]],
    data: DataRecipe,
    template: ChatTemplate,
    pieces: PieceTokenizer,
    bad: BadRows,
    found: _Counted,
) -> None:
    only_last = data.train_on != "assistant"
    places: list[str] = []
    texts: list[Rendered] = []
    for place, messages in conversations:
        try:
            texts.append(rendered(template, messages, only_last=only_last))
            places.append(place)
        except RowError as problem:
            bad.add_untrainable(place, str(problem))
    for text in texts[:1]:
        found.notes += [note for note in template_notes(template, text) if note not in found.notes]
    bos_id = pieces.tokenizer.bos_token_id
    unknown = {pieces.tokenizer.unk_token_id} - {None, bos_id, pieces.tokenizer.eos_token_id}
    for place, row in zip(places, masked(pieces, texts, data.train_on), strict=True):
        if isinstance(row, RowError):
            bad.add_untrainable(place, str(row))
            continue
        example = shortened(row.example, data.max_length, data.on_too_long, bos_id)
        if example is None:
            found.dropped += 1
        elif example.trained_tokens == 0:
            bad.add_untrainable(place, _no_label(row.example, data))
        else:
            found.truncated += len(example.input_ids) < len(row.example.input_ids)
            found.unknown += bool(unknown.intersection(example.labels))
            found.documents.append(example)
            prompt = last_tokens(row.prompt_ids, data.max_length, bos_id)
            found.questions.append(Question(prompt, row.answer))


def _value(row: Row) -> object:
    if row.problem is not None:
        raise RowError(row.problem)
    return row.value


def _no_label(example: Example, data: DataRecipe) -> str:
    return (
        f"no trained token is left of {len(example.input_ids)} after {data.on_too_long} to "
        f"data.max_length {data.max_length}"
    )
