"""Did you mean ...? The nearest of the words that are allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

LONGEST_WORD = 60
SHORTEST_BEGINNING = 4


def closest(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The allowed word that `word` was probably meant to be, or None.

    Upper case, hyphens and blanks do not count; the beginning of one allowed word is enough.
    """
    return closest_answer(word, {each: each for each in allowed}, cutoff)


def closest_answer(word: str, answers: Mapping[str, str], cutoff: float = 0.6) -> str | None:
    """The value whose key is nearest to `word`, or None."""
    by_spelling = {_plain(each): answer for each, answer in answers.items()}
    plain = _plain(word)
    near = difflib.get_close_matches(plain, list(by_spelling), n=1, cutoff=cutoff)
    if not near and len(plain) >= SHORTEST_BEGINNING:
        begun = [each for each in by_spelling if each.startswith(plain)]
        near = begun if len(begun) == 1 else []
    return by_spelling[near[0]] if near else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean x?', or nothing when no allowed word is near."""
    near = closest(word, allowed)
    return f" Did you mean {near}?" if near else ""


def _plain(word: str) -> str:
    return word[:LONGEST_WORD].strip().lower().replace("-", "_").replace(" ", "_")
