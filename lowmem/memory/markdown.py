"""Blocks as Markdown."""

from __future__ import annotations

import re

from lowmem.memory.blocks import Block, Bullets, Code, Heading, Paragraph, Picture, Table


def markdown(blocks: list[Block]) -> str:
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text, strong):
            return f"**{_plain(text)}**" if strong else _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(path, says):
            return f"![{_plain(says)}]({path})"
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text.rstrip()}\n{fence}"
        case Table(head, rows, strong, numbers):
            lines = [_row(head), _row(["---", *("---:" if numbers else "---" for _ in head[1:])])]
            for index, row in enumerate(rows):
                cells = [_plain(cell) for cell in row]
                lines.append(
                    _row([f"**{cell}**" if cell else "" for cell in cells] if index in strong else cells)
                )
            return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """`text` so that Markdown shows it as it is: model names have underscores, messages have anything."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
