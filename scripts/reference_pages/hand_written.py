"""The part of a generated page that a person writes: what stands between two markers stays."""

from __future__ import annotations

from pathlib import Path

START = "<!-- by hand: `make docs` keeps what stands from here -->"
END = "<!-- to here -->"


def hand_written(page: Path, headings: tuple[str, ...]) -> list[str]:
    """The lines to put into `page` anew: its own, markers included, or the headings alone where it has none yet.

    Raises ValueError for a page without both markers, whose text would be lost.
    """
    if not page.exists():
        return [START, "", *(line for heading in headings for line in (f"## {heading}", "")), END]
    lines = page.read_text().splitlines()
    if lines.count(START) != 1 or lines.count(END) != 1 or lines.index(END) < lines.index(START):
        raise ValueError(
            f"{page} needs the line {START} and below it the line {END}, once each, around what is written by hand. "
            "Put them back."
        )
    return lines[lines.index(START) : lines.index(END) + 1]


def sections(page: Path) -> dict[str, list[str]]:
    """What is written by hand in `page`, the lines that are not empty under each heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in hand_written(page, ())[1:-1]:
        if line.startswith("## "):
            heading = line.removeprefix("## ")
            found[heading] = []
        elif line and heading:
            found[heading].append(line)
    return found
