"""The settings of an algorithm, read from its constructor's annotations.

    def __init__(self, params, lr: LearningRate = 1e-3, *, rank: Annotated[int, Range(at_least=1), "..."] = 128)

The signature is the single description: it checks arguments, fills param groups, documents the class,
and generates the table that recipes are validated against without importing torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import torch

from lowmem.optim.storage import FORMATS


@dataclass(frozen=True)
class Range:
    """Allowed numbers; every bound is optional. For a pair, each member must lie inside."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allows(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        signs = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs.items() if bound is not None)


Storage = Mapping[str, str]

LearningRate = Annotated[float, Range(at_least=0), "learning rate"]
WeightDecay = Annotated[float, Range(at_least=0), "decoupled decay: w <- w - lr * weight_decay * w"]
Betas = Annotated[tuple[float, float], Range(at_least=0, below=1), "decay of the first and second moment"]
Eps = Annotated[float, Range(above=0), "added to the root of the second moment"]
StorageSetting = Annotated[
    Storage | None, "format of each state role; param (the default) follows the weight's dtype"
]
Rounding = Annotated[
    Literal["stochastic", "nearest"],
    "how bfloat16 weights and bfloat16 or int8 moments are rounded; nearest loses small updates",
]
Seed = Annotated[int, Range(at_least=0), "seed of projections and stochastic rounding"]


@dataclass(frozen=True)
class Setting:
    """One keyword of an algorithm. `kind` is int, float, bool, str, float_pair or storage."""

    name: str
    kind: str
    default: Any
    optional: bool = False
    choices: tuple[str, ...] = ()
    allowed: Range | None = None
    doc: str = ""

    def problem(self, value: Any) -> str | None:
        """Why `value` is not allowed, in words that complete "<name> ...", or None."""
        if value is None:
            return None if self.optional else f"must be {self.expected()}, found None"
        if self.kind == "storage":
            return _storage_problem(value)
        if not self._has_kind(value):
            return f"must be {self.expected()}, found {_shown(value)}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}, found {value!r}{did_you_mean(value, self.choices)}"
        numbers = value if self.kind == "float_pair" else [value]
        if self.kind in ("int", "float", "float_pair") and not all(
            math.isfinite(number) and (self.allowed is None or self.allowed.allows(number))
            for number in numbers
        ):
            return f"must be {self.expected()}, found {_shown(value)}"
        return None

    def _has_kind(self, value: Any) -> bool:
        if self.kind == "float_pair":
            return (
                isinstance(value, (tuple, list))
                and len(value) == 2
                and all(_is_number(each) for each in value)
            )
        if self.kind == "float":
            return _is_number(value)
        if self.kind == "int":
            return isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, {"bool": bool, "str": str}[self.kind])

    def expected(self) -> str:
        nouns = {
            "int": "a whole number",
            "float": "a finite number",
            "float_pair": "a pair of numbers",
            "bool": "true or false",
            "str": "text",
            "storage": "a mapping from role to format",
        }
        bounds = f" {self.allowed}" if self.allowed else ""
        return nouns[self.kind] + bounds + (" or None" if self.optional else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _storage_problem(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"must be a mapping such as {{'moment': 'bf16'}}, found {value!r}"
    for role, chosen in value.items():
        if role not in FORMATS:
            return f"has no role {role!r}{did_you_mean(role, FORMATS)} Roles: {', '.join(FORMATS)}"
        formats = FORMATS[role]
        if chosen not in formats:
            return f"of {role} must be one of {', '.join(formats)}, found {chosen!r}{did_you_mean(chosen, formats)}"
    return None


def did_you_mean(word: Any, known: Any) -> str:
    """The end of a sentence: ". Did you mean 'x'?" where one of `known` is close to `word`, else "."."""
    close = difflib.get_close_matches(str(word), [str(each) for each in known], n=1, cutoff=0.6)
    return f". Did you mean {close[0]!r}?" if close else "."


def settings_of(optimizer_class: Any) -> dict[str, Setting]:
    """The settings of an optimizer class, in the order of its constructor."""
    return _settings_of(optimizer_class.__init__)


@functools.cache
def _settings_of(constructor: Callable[..., None]) -> dict[str, Setting]:
    hints = typing.get_type_hints(constructor, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name not in ("self", "params"):
            found[name] = _setting(name, hints[name], parameter.default)
    return found


def _setting(name: str, annotation: Any, default: Any) -> Setting:
    allowed, doc = None, ""
    if typing.get_origin(annotation) is Annotated:
        annotation, *notes = typing.get_args(annotation)
        allowed = next((note for note in notes if isinstance(note, Range)), None)
        doc = next((note for note in notes if isinstance(note, str)), "")
    optional = False
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        optional, annotation = True, members[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(annotation) is Literal:
        choices, annotation = typing.get_args(annotation), str
    if annotation == Storage:
        kind = "storage"
    elif typing.get_origin(annotation) is tuple:
        kind = "float_pair"
    else:
        kind = annotation.__name__
    return Setting(name, kind, default, optional, choices, allowed, doc)


def described(optimizer_class: type) -> dict[str, dict[str, Any]]:
    """The settings as plain data, for the table that recipes are checked against."""
    table: dict[str, dict[str, Any]] = {}
    for name, setting in settings_of(optimizer_class).items():
        default = list(setting.default) if setting.kind == "float_pair" else setting.default
        entry: dict[str, Any] = {"type": setting.kind, "optional": setting.optional, "default": default}
        if setting.choices:
            entry["choices"] = list(setting.choices)
        if setting.kind == "storage":
            entry["roles"] = {role: list(formats) for role, formats in FORMATS.items()}
        for bound in ("at_least", "above", "at_most", "below"):
            if setting.allowed and getattr(setting.allowed, bound) is not None:
                entry[bound] = getattr(setting.allowed, bound)
        table[name] = {**entry, "doc": setting.doc}
    return table
