"""Blocks as one HTML file that needs nothing else: styles inline, pictures as data, no script, no network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from lowmem.memory.blocks import Block, Bullets, Code, Heading, Paragraph, Picture, Table

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       max-width: 52rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid #ddd; }
p.strong { font-size: 1.1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .75rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
th:not(:first-child), td:not(:first-child) { text-align: right; padding: .3rem 0 .3rem 1.4rem; }
table.words th:not(:first-child), table.words td:not(:first-child) { text-align: left; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid #999; font-weight: 600; }
tr.strong td { font-weight: 700; border-top: 1px solid #999; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f6f6f6; border-radius: 4px; padding: .9rem 1rem; overflow-x: auto;
      font-size: .85rem; line-height: 1.45; }
@media print { body { margin: 0 auto; } pre { white-space: pre-wrap; } }
"""


def html(blocks: list[Block], folder: Path) -> str:
    """`folder` is where the pictures' paths start."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "lowmem report")
    body = "\n".join(_block(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text, strong):
            return f'<p class="strong">{escape(text)}</p>' if strong else f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Picture(path, says):
            data = base64.b64encode((folder / path).read_bytes()).decode("ascii")
            return f'<img alt="{escape(says)}" src="data:image/png;base64,{data}">'
        case Code(text, _):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Table(head, rows, strong, numbers):
            cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
            thead = f"<thead><tr>{cells}</tr></thead>\n" if any(head) else ""
            lines = []
            for index, row in enumerate(rows):
                mark = ' class="strong"' if index in strong else ""
                lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
            kind = "numbers" if numbers else "words"
            body = "\n".join(lines)
            return f'<div class="wide"><table class="{kind}">\n{thead}<tbody>\n{body}\n</tbody></table></div>'
