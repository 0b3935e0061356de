"""docs/scaling.md is what its script gives, and what it concludes follows from its numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_scaling_page.py"))
PAGE = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_the_memory_of_the_smallest_model_is_up_to_date(optimizer):
    assert SCRIPT["memory_row"]("LLaMA-2-7B", optimizer) in PAGE.read_text().splitlines(), "run `make docs`"


@pytest.mark.parametrize("processes", [8, 1024])
def test_the_owners_of_the_smallest_model_are_up_to_date(processes):
    assert SCRIPT["owner_row"]("LLaMA-2-7B", processes) in PAGE.read_text().splitlines(), "run `make docs`"


def test_words_and_traffic_are_up_to_date():
    text = PAGE.read_text()
    assert text.startswith(SCRIPT["text"]()), "run `make docs`"
    assert "\n".join(SCRIPT["sent_rows"]("LLaMA-2-7B")) in text, "run `make docs`"
    assert len(text.splitlines()) <= 300


@pytest.mark.slow
def test_the_whole_page_is_up_to_date():
    assert PAGE.read_text() == SCRIPT["scaling_page"](), "run `make docs`"
