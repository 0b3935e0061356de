"""What preparation hands to training and to generation."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # the label torch's cross-entropy leaves out


@dataclass(frozen=True)
class Example:
    """One sequence. The three lists are equally long; `labels[i]` is `input_ids[i]` where the token is
    trained and `IGNORED` elsewhere. `position_ids` is given when several documents share the sequence."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None

    @property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class Question:
    """A prompt as the model sees it right before it answers, and the answer it should write."""

    prompt_ids: list[int]
    answer: str
