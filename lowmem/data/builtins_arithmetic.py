"""Additions as pupils write them: column by column from the right, the carry as a last summand.

    What is 347 + 85?
    7+5=12, 4+8+1=13, 3+0+1=4, so 432.

A small model cannot add three-digit numbers in one go, but it can learn to look up two digits, to add them
and to carry; the working is the part of the answer that it learns from, so an answer counts as right only
when the working is right too. About 490,000 pairs of numbers exist: a model that has seen 10,000 of them has
to add, it cannot remember.
"""

from __future__ import annotations

from itertools import zip_longest

from lowmem.data.builtins_problem import Problem, Rolls

WORDINGS = ("Add {a} and {b}.", "What is {a} + {b}?", "{a} plus {b} is?")
TWO_DIGITS, THREE_DIGITS = (10, 99), (100, 999)


def addition(rolls: Rolls) -> Problem:
    """Two numbers of two or, twice as often, three digits. 3 + 5 and 5 + 3 are the same problem."""
    ranges = (TWO_DIGITS, THREE_DIGITS, THREE_DIGITS)
    a, b = (rolls.number(*rolls.one_of(ranges)) for _ in range(2))
    return Problem(
        key=f"{min(a, b)}+{max(a, b)}",
        prompt=rolls.one_of(WORDINGS).format(a=a, b=b),
        response=worked_sum(a, b),
    )


def worked_sum(a: int, b: int) -> str:
    """`7+5=12, 4+8+1=13, 3+0+1=4, so 432.` for 347 and 85."""
    columns, carry = [], 0
    for upper, lower in zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        total = int(upper) + int(lower) + carry
        columns.append(f"{upper}+{lower}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{', '.join(columns)}, so {a + b}."
