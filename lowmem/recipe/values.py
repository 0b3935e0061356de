"""One value against the type and range that a key allows."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from lowmem.recipe.node import Node, number_from
from lowmem.recipe.problems import shown
from lowmem.recipe.suggest import did_you_mean

LARGEST_WHOLE_NUMBER = 2**63 - 1


class NotAllowedError(ValueError):
    """The value has no place here; the text is a hint how to write it, or empty."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a number; `at_least` and `at_most` are inclusive, `above` and `below` are not."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Limits:
        return cls(**{name: description.get(name) for name in ("at_least", "above", "at_most", "below")})

    def allow(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)


def read_value(annotation: Any, limits: Limits, node: Node) -> Any:
    """The value of `node` as `annotation` wants it: int for float is fine, bool is no number, NaN and
    infinity are refused. Raises NotAllowedError with a hint."""
    members = members_of(annotation)
    if node.value is None and type(None) in members:
        return None
    hints: list[str] = []
    for member in members:
        if member is not type(None):
            try:
                return _read_one(member, limits, node)
            except NotAllowedError as error:
                hints.append(str(error))
    if type(None) in members and isinstance(node.value, str) and node.text.lower() in ("none", "nil"):
        raise NotAllowedError("Write null.")
    raise NotAllowedError(next(filter(None, hints), ""))


def expected(annotation: Any, limits: Limits) -> str:
    """What a key accepts, in words that complete 'it must be ...'."""
    members = members_of(annotation)
    words = " or ".join(_expected_one(member, limits) for member in members if member is not type(None))
    return f"{words}, or null" if type(None) in members else words


def members_of(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _read_one(kind: Any, limits: Limits, node: Node) -> Any:
    value = node.value
    if kind is str:
        return _text(node)
    if kind is bool:
        if not isinstance(value, bool):
            raise NotAllowedError("")
        return value
    if kind is int or kind is float:
        return _number(kind, limits, node)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if not isinstance(value, str) or value not in choices:
            raise NotAllowedError(did_you_mean(node.text, choices).strip() if node.text else "")
        return value
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        if not isinstance(value, list):
            single = isinstance(value, str) and bool(value)
            raise NotAllowedError(f"Write [{shown(node.text)}]." if single else "")
        return [_read_one(item_kind, limits, item) for item in value]
    raise TypeError(f"a recipe key of type {kind!r} cannot be read")


def _text(node: Node) -> str:
    if isinstance(node.value, (bool, int, float)):
        raise NotAllowedError(f'Put it in quotes: "{shown(node.text)}".')
    if not isinstance(node.value, str):
        raise NotAllowedError("")
    if not node.value.strip():
        raise NotAllowedError("Empty text means nothing here.")
    return node.value


def _number(kind: Any, limits: Limits, node: Node) -> int | float:
    number = node.value
    if isinstance(number, str) and node.is_plain:
        number = number_from(node.text)  # 1e-4 is text to YAML
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        is_quoted_number = isinstance(node.value, str) and number_from(node.text) is not None
        raise NotAllowedError("Remove the quotes." if is_quoted_number else "")
    if kind is int and isinstance(number, float):
        is_small = number.is_integer() and abs(number) < 1e15
        raise NotAllowedError(f"Write {int(number)}." if is_small and limits.allow(number) else "")
    if kind is int and abs(number) > LARGEST_WHOLE_NUMBER:
        raise NotAllowedError("That is more than 64 bits can hold.")
    if not math.isfinite(number) or not limits.allow(number):
        raise NotAllowedError("")
    return number if kind is int else float(number)


def _expected_one(kind: Any, limits: Limits) -> str:
    if kind is str:
        return "text"
    if kind is bool:
        return "true or false"
    if kind is int or kind is float:
        noun = "a whole number" if kind is int else "a number"
        return f"{noun} {limits}" if str(limits) else noun
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return f"one of {', '.join(choices)}"
    if typing.get_origin(kind) is list:
        return "a list, as in [a, b]"
    raise TypeError(f"a recipe key of type {kind!r} cannot be described")
