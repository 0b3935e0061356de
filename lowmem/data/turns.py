"""Where the answers are in a rendered conversation, to the character, proven and not guessed.

The conversation is rendered twice: as it is, and with each answer replaced by a placeholder. The text
around the placeholders must be found again, piece by piece, around the answers of the first rendering;
then everything in between is exactly an answer. A template that changes an answer by more than the white
space at its ends is a problem of that row, never a wrong mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.data.bad_rows import RowError
from lowmem.data.formats import Message
from lowmem.data.rendering import ChatTemplate

_THINK_END = "</think>"


@dataclass(frozen=True)
class Turn:
    """`text[start:end]` is what the model has to write: `answer` and the mark that ends a turn.

    It starts where the prompt for a generation ends, so it may begin with the template's own blank or
    empty thinking block, which the model must write too.
    """

    start: int
    end: int
    answer: str


@dataclass(frozen=True)
class Rendered:
    text: str
    turns: list[Turn]
    ends: bool  # whether the template itself ends the last answer


def rendered(template: ChatTemplate, messages: Sequence[Message], *, only_last: bool) -> Rendered:
    """The text of a conversation that ends with an answer, and its answers (or only the last one).

    A template that never ends an answer gets the end-of-text token behind the last one. Raises
    RowError when the answers cannot be told from the rest.
    """
    if template.marks_answers:
        text, marks = template.render_with_marks(messages)
    else:
        text, marks = template.render(messages), []
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if template.marks_answers and len(marks) != len(indices):
        raise RowError(
            f"the template {template.name} has {len(marks)} generation blocks for {len(indices)} answers"
        )
    chosen = indices[-1:] if only_last else indices
    answers = _answer_ranges(template, messages, chosen, text)
    if template.marks_answers:
        ranges = _marked(template, marks[-len(chosen) :], answers)
    else:
        ranges = _prompted(template, messages, chosen, text, answers)

    last_end = ranges[-1][1]
    turn_end = text[last_end:].rstrip()
    ends = bool(text[answers[-1][1] :].strip())
    if not ends and template.tokenizer.eos_token:
        turn_end = str(template.tokenizer.eos_token)
        text = text[:last_end] + turn_end
    contents = [messages[i]["content"] for i in chosen]
    turns = [
        Turn(start, _with_turn_end(template, text, end, turn_end), answer)
        for (start, end), answer in zip(ranges, contents, strict=True)
    ]
    return Rendered(text, turns, ends)


def _answer_ranges(
    template: ChatTemplate, messages: Sequence[Message], chosen: Sequence[int], text: str
) -> list[tuple[int, int]]:
    """Character ranges of the answers at `chosen`, by the text around placeholders."""
    stem = "AnswerOfTurn"
    while stem in text or any(stem in message["content"] for message in messages):
        stem += "X"
    replaced = [dict(message) for message in messages]
    places = []
    for index in chosen:
        places.append(f"{stem}{index}E")
        replaced[index]["content"] = _thinking(messages[index]["content"]) + places[-1]
    frame = template.render(replaced)
    around, rest = [], frame
    for index, place in zip(chosen, places, strict=True):
        before, found, rest = rest.partition(place)
        if not found or place in rest:
            word = "repeats" if found else "leaves out or changes"
            raise RowError(f"the template {template.name} {word} assistant turn {index + 1}")
        around.append(before)
    around.append(rest)

    ranges = []
    position = 0
    for number, index in enumerate(chosen):
        content = messages[index]["content"]
        start = position + len(around[number])
        end = _end_of(content.removeprefix(_thinking(content)), text, start, around[number + 1])
        if end is None or not text.startswith(around[number], position):
            raise _not_verbatim(template, index)
        ranges.append((start, end))
        position = end
    if position + len(around[-1]) != len(text):
        raise _not_verbatim(template, chosen[-1])
    return ranges


def _thinking(content: str) -> str:
    """The reasoning before an answer; many templates move or remove it, so it is no part of the proof."""
    return content[: content.rfind(_THINK_END) + len(_THINK_END)] if _THINK_END in content else ""


def _end_of(answer: str, text: str, start: int, after: str) -> int | None:
    for candidate in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
        end = start + len(candidate)
        if text.startswith(candidate, start) and text.startswith(after, end):
            return end
    return None


def _prompted(
    template: ChatTemplate,
    messages: Sequence[Message],
    chosen: Sequence[int],
    text: str,
    answers: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """The ranges begun where the prompt of a generation ends, so that training and generation meet."""
    ranges = []
    floor = 0
    for index, (start, end) in zip(chosen, answers, strict=True):
        prompt = template.render(messages[:index], generation_prompt=True)
        begins = text.startswith(prompt) and floor <= len(prompt) <= start
        if begins and text[len(prompt) : start].strip():
            # text between prompt and answer: the model's to write, unless the template has no prompt at all
            begins = prompt != template.render(messages[:index])
        if _thinking(messages[index]["content"]) and not begins:
            raise RowError(
                f"the template {template.name} changes the reasoning before the answer of turn {index + 1}; "
                "train_on: last_turn may help, or a template that keeps it"
            )
        ranges.append((len(prompt) if begins else start, end))
        floor = end
    return ranges


def _marked(
    template: ChatTemplate, marks: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    for (start, end), (answer_start, answer_end) in zip(marks, answers, strict=True):
        if start > answer_start or end < answer_end:
            raise RowError(
                f"the generation block of the template {template.name} does not hold the whole answer"
            )
    return list(marks)


def _with_turn_end(template: ChatTemplate, text: str, end: int, turn_end: str) -> int:
    if turn_end and text.startswith(turn_end, end):
        end += len(turn_end)
    # a token that swallows the white space behind it cannot be cut from it
    if any(text.endswith(token, 0, end) for token in template.swallowing_tokens):
        while text[end : end + 1].isspace():
            end += 1
    return end


def _not_verbatim(template: ChatTemplate, index: int) -> RowError:
    return RowError(
        f"the template {template.name} does not write assistant turn {index + 1} as it stands, so its tokens "
        "cannot be told from the rest; train_on: last_turn may help, or a template that keeps the answers"
    )
