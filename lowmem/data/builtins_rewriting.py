"""Made-up words to rewrite: `Write molitu backwards.` is answered by `utilom`."""

from __future__ import annotations

from collections.abc import Callable

from lowmem.data.builtins_problem import Problem, Rolls

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
FEWEST_SYLLABLES, MOST_SYLLABLES = 2, 4
# instruction -> what it makes of a word
WAYS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("backwards", lambda word: word[::-1]),
    ("in capitals", str.upper),
    ("without vowels", lambda word: "".join(letter for letter in word if letter not in VOWELS)),
    ("with every letter twice", lambda word: "".join(letter * 2 for letter in word)),
)


def rewriting(rolls: Rolls) -> Problem:
    """A word of two to four syllables; a word is the same problem whatever is to be done with it."""
    syllables = rolls.number(FEWEST_SYLLABLES, MOST_SYLLABLES)
    word = "".join(rolls.one_of(CONSONANTS) + rolls.one_of(VOWELS) for _ in range(syllables))
    instruction, rewrite = rolls.one_of(WAYS)
    return Problem(key=word, prompt=f"Write {word} {instruction}.", response=rewrite(word))
