"""What the documentation takes from the code is what the code says now."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lowmem.optim.registry import OPTIMIZERS, optimizer_class

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from reference_pages import hand_written as by_hand  # noqa: E402
from reference_pages.matrix_costs import gradient_needed, state_values  # noqa: E402
from reference_pages.optimizer_index import INDEX  # noqa: E402
from reference_pages.optimizer_page import FOLDER, WRITTEN_BY_HAND, page_of  # noqa: E402

PAGES = runpy.run_path(str(ROOT / "scripts" / "make_reference_pages.py"))["PAGES"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_generated_page_is_up_to_date(page):
    assert page.exists(), "run `make docs`"
    assert page.read_text() == PAGES[page](), "run `make docs`"


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_page_of_every_optimizer_says_when_to_use_it_and_where_it_ends(name):
    written = by_hand.sections(page_of(name))
    for heading in WRITTEN_BY_HAND:
        assert written.get(heading), (
            f"docs/optimizers/{name}.md has no text under '{heading}'. "
            "Write some lines there, between the two markers; `make docs` keeps them."
        )


def test_there_is_no_page_of_an_optimizer_that_is_gone():
    assert set(FOLDER.iterdir()) == {INDEX, *map(page_of, OPTIMIZERS)}


def test_what_is_written_by_hand_is_kept_and_a_new_page_has_the_headings_for_it(tmp_path):
    page = tmp_path / "new.md"
    page.write_text("\n".join(by_hand.hand_written(page, ("One", "Two"))))
    assert by_hand.sections(page) == {"One": [], "Two": []}
    mine = page.read_text().replace("## Two", "kept | as *it* is\n\n## Two")
    page.write_text(f"old\n{mine}\nold")
    assert "\n".join(by_hand.hand_written(page, ("Other",))) == mine
    assert by_hand.sections(page) == {"One": ["kept | as *it* is"], "Two": []}


@pytest.mark.parametrize("lost", [by_hand.START, by_hand.END])
def test_a_page_that_lost_a_marker_is_not_written_over(tmp_path, lost):
    page = tmp_path / "page.md"
    page.write_text("\n".join([by_hand.START, "mine", by_hand.END]).replace(lost, ""))
    with pytest.raises(ValueError, match="Put them back"):
        by_hand.hand_written(page, ())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {}),
        ("sgd", {}),
        ("adafactor", {}),
        ("muon", {}),
        ("galore", {"rank": 7}),
        ("fira", {"rank": 7}),
        ("apollo", {"rank": 7}),
        ("dct_adamw", {"rank": 7}),
        ("frugal", {"density": 0.25}),
        ("block_adam", {}),
    ],
)
def test_the_formula_of_a_matrix_state_gives_its_bytes(name, settings):
    sides = {"m": 24, "n": 40, "r": settings.get("rank"), "k": 10}
    matrix = torch.nn.Parameter(torch.empty(sides["m"], sides["n"], device="meta"))
    counted = optimizer_class(name)([matrix], **settings).state_bytes()
    values = eval(re.sub(r"(?<=[a-z\d]) (?=[a-z])", " * ", state_values(name)), sides)
    assert counted == 4 * values + 4  # float32, and the count of steps


def test_the_gradient_that_is_needed_is_told_apart():
    assert gradient_needed("galore") == "its projection"
    assert gradient_needed("fira") == gradient_needed("swan") == "the whole"
    assert gradient_needed("adafactor") == gradient_needed("sinkgd") == "some rows"
