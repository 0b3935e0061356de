"""Rows of JSON Lines and JSON files, each with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lowmem.data.file_bytes import decoded
from lowmem.errors import RecipeError

_BLANKS = re.compile(r"[ \t\n\r]*")

Found = tuple[str, Any, str | None]  # place, value, problem


def json_lines(name: str, lines: Iterable[bytes]) -> Iterator[Found]:
    """One row a line. A line that cannot be read is a row with a problem; blank lines at the end are none."""
    blank: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank.append(number)
            continue
        yield from ((f"{name}:{n}", None, "the line is empty") for n in blank)
        blank.clear()
        place = f"{name}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8")), None
        except UnicodeDecodeError as error:
            yield place, None, f"byte 0x{line[error.start]:02x} is not UTF-8"
        except json.JSONDecodeError as error:
            hint = _line_hint(line, number)
            yield place, None, f"not valid JSON: {error.msg} at column {error.colno}{hint}"
        except (ValueError, RecursionError) as error:
            yield place, None, f"not readable JSON: {error}"


def _line_hint(line: bytes, number: int) -> str:
    if number == 1 and line.strip() in (b"[", b"{"):
        return "; a .jsonl file holds one object a line, name a JSON document .json"
    return ""


def json_rows(name: str, data: bytes) -> Iterator[Found]:
    """The elements of a list, of the one list inside an object, or the objects of a file of JSON lines."""
    text = decoded(data, name)
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _list_elements(name, text, start)
    elif text[start : start + 1] == "{":
        yield from _object_rows(name, text, start, data)
    elif start < len(text):
        raise RecipeError(
            f"{name}:1: a JSON file of rows is a list or an object, found {text[start:][:20]!r}."
        )


def _object_rows(name: str, text: str, start: int, data: bytes) -> Iterator[Found]:
    value, end = _decode_at(name, text, start)
    if text[end:].strip():
        yield from json_lines(name, data.splitlines())
        return
    lists = [key for key, member in value.items() if isinstance(member, list)]
    if len(lists) != 1:
        found = f"lists under {', '.join(lists)}" if lists else f"only {', '.join(value) or 'no keys'}"
        raise RecipeError(f"{name}:1: an object must hold exactly one list of rows, found {found}.")
    for number, row in enumerate(value[lists[0]], 1):
        yield f"{name} (row {number} of {lists[0]})", row, None


def _list_elements(name: str, text: str, start: int) -> Iterator[Found]:
    position, number, line, counted = _skip(text, start + 1), 0, 1, 0
    while text[position : position + 1] != "]":
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        value, end = _decode_at(name, text, position)
        yield f"{name}:{line} (row {number})", value, None
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
            if text[position : position + 1] == "]":
                raise _syntax_error(name, text, position, f"a comma behind row {number}, but no row after it")
        elif text[position : position + 1] != "]":
            raise _syntax_error(name, text, position, f"expected , or ] after row {number}")
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise _syntax_error(name, text, rest, "text behind the end of the list")


def _decode_at(name: str, text: str, position: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(name, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _syntax_error(name, text, position, str(error)) from error


def _skip(text: str, position: int) -> int:
    blanks = _BLANKS.match(text, position)
    assert blanks is not None
    return blanks.end()


def _syntax_error(name: str, text: str, position: int, message: str) -> RecipeError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return RecipeError(f"{name}:{line}: not valid JSON at column {column}: {message}.")
