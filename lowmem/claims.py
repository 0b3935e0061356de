"""Parameters that groups claim by patterns in their names. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def claimed(
    named: Sequence[tuple[str, T]], patterns_of: Sequence[Sequence[str]], *, head: str | None = None
) -> list[list[tuple[str, T]]]:
    """For each group's patterns the parameters whose name contains one of them, in the order of `named`.

    `head` is the name of the parameter that has an optimizer as the output head. Raises ValueError, listing near
    names, for a pattern that no name contains, and for a name that two of them claim.
    """
    found: list[list[tuple[str, T]]] = []
    first = {} if head is None else {head: "head"}
    for index, patterns in enumerate(patterns_of):
        members = []
        for pattern in patterns:
            if not any(pattern in name for name, _ in named):
                raise ValueError(
                    f"groups[{index}]: match {pattern!r} is in the name of no trainable parameter. "
                    f"Words in their names: {', '.join(near_words(pattern, [name for name, _ in named]))}"
                )
        for name, param in named:
            matching = [pattern for pattern in patterns if pattern in name]
            if not matching:
                continue
            claim = f"match {matching[0]!r} of groups[{index}]"
            if name in first:
                raise ValueError(
                    f"{name} is claimed twice: by {first[name]} and by {claim}. Leave one of them out, or name longer "
                    "parts of names, so that each parameter is claimed once."
                )
            first[name] = claim
            members.append((name, param))
        found.append(members)
    return found


def near_words(pattern: str, names: Iterable[str], *, most: int = 12) -> list[str]:
    """Words of dotted `names` that are close to `pattern`, or some of all where none is."""
    words = sorted({word for name in names for word in name.split(".") if word and not word.isdigit()})
    return difflib.get_close_matches(pattern, words, n=3, cutoff=0.4) or words[:most]
