"""A report before it is Markdown or HTML: a list of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers unless said. Rows in `strong` stand out."""

    head: list[str]
    rows: list[list[str]]
    strong: tuple[int, ...] = ()
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """`path` is relative to the report, `says` is for those who do not see it."""

    path: str
    says: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str


Block = Heading | Paragraph | Bullets | Table | Picture | Code
