"""Letters to put in order: `Sort q g a m e from a to z.` is answered by `a e g m q`."""

from __future__ import annotations

import string

from lowmem.data.builtins_problem import Problem, Rolls

FEWEST_LETTERS, MOST_LETTERS = 5, 7


def sorting(rolls: Rolls) -> Problem:
    """Five to seven different letters; the same letters in another order are the same problem."""
    letters = rolls.some_of(string.ascii_lowercase, rolls.number(FEWEST_LETTERS, MOST_LETTERS))
    is_ascending = rolls.one_of((True, False))
    direction = "a to z" if is_ascending else "z to a"
    return Problem(
        key="".join(sorted(letters)),
        prompt=f"Sort {' '.join(letters)} from {direction}.",
        response=" ".join(sorted(letters, reverse=not is_ascending)),
    )
