"""Documents of a plain text file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowmem.data.file_bytes import decoded

DIVIDER = "<|endoftext|>"  # alone on a line, as in the files of GPT-2, TinyStories and others


def text_documents(name: str, data: bytes) -> Iterator[tuple[str, Any, str | None]]:
    """`{"text": ...}` for each part between divider lines that is not blank; places name its first line."""
    first, lines = 1, []
    for number, line in enumerate([*decoded(data, name).split("\n"), DIVIDER], 1):
        if line.strip() != DIVIDER:
            lines.append(line)
            continue
        if any(part.strip() for part in lines):
            yield f"{name}:{first}", {"text": "\n".join(lines)}, None
        first, lines = number + 1, []
