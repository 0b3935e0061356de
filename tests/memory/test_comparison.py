"""The document, the table and the report of a comparison, made from numbers written by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from lowmem.errors import FaultError, RecipeError
from lowmem.memory.comparison import (
    Method,
    comparison_document,
    is_comparison,
    read_comparison,
    table,
    write_comparison,
)
from lowmem.memory.ledger import PARTS
from lowmem.recipe.load import load_recipe

MIB = 2**20
RECIPE = """
model: {name_or_path: builtin:tiny-llama, dtype: float32}
data: {train: {builtin: arithmetic}}
optimizer: {name: galore, lr: 2.0e-3, rank: 8, refresh_every: 100, fallback: {name: adamw, lr: 4.0e-3}}
"""


def found(scale: float = 1.0, **more) -> dict:
    """What a method's process writes."""
    parts = dict(zip(PARTS, (int(scale * weight * MIB) for weight in (4, 4, 8, 2, 1, 0)), strict=True))
    return {
        "peak_bytes": sum(parts.values()), "steady_peak_bytes": sum(parts.values()), "reserved_bytes": None,
        "parts": parts, "measured_by": "tracked", "measured_steps": 3, "warnings": [],
        "optimizer_state_bytes": parts["optimizer_state"],
        "step_seconds": {"median": 0.04, "min": 0.0391, "max": 0.125}, "timed_seconds": [0.04, 0.0391, 0.125],
        "tokens_per_second": 12345.6, "tokens": 4000, "losses": [4.5, 3.25, 2.13, 2.0, 1.9, 1.75],
        "losses_compare": True, "held_out_loss": 1.8, "held_out_tokens": 99, "batch_checksums": ["a"] * 6,
        "notes": [], "environment": {"python": "3.11", "gpus": [], "packages": {"torch": "2.13", "peft": None}},
        "conditions": {"parameters": 812345, "device": "cpu"}, **more,
    }  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "sums.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "sums.yaml")


@pytest.fixture
def document(recipe):
    def make(*pairs, **more):
        methods = []
        for name, one in pairs:
            variant = name if name.startswith("adamw_f") else None
            methods.append((Method(name, recipe, variant), one))
        settings = {"watched_steps": [1, 2, 5], "timed_steps": [3, 4, 6], "sequence_length": 56, **more}
        return comparison_document("sums", methods, steps=6, **settings)

    return make


def lines_of(document) -> dict[str, list[str]]:
    """First word -> cells of each row of the terminal's table."""
    rows = table(document).split("\n\n")[0].splitlines()
    return {line[:26].split("  ")[0].strip(): line.split() for line in rows if not line.startswith("-")}


def test_the_saving_is_against_adamw_fused_and_may_be_negative(document):
    pairs = [("recipe", found(0.5)), ("adamw_fused", found(1)), ("adamw_foreach", found(1.2))]
    entries = document(*pairs)["methods"]
    assert [entry["saved_bytes"] for entry in entries] == [
        19 * MIB - 19 * MIB // 2,
        0,
        19 * MIB - sum(found(1.2)["parts"].values()),
    ]
    assert entries[0]["saved_fraction"] == 0.5
    text = table(document(*pairs))
    assert "50.0 %" in text
    assert "-20.0 %" in text
    assert "Saved is peak memory against adamw_fused" in text


@pytest.mark.parametrize("failed", [[], [("adamw_fused", {"reason": "out of memory"})]])
def test_without_adamw_fused_there_is_no_saving(document, failed):
    found_document = document(("recipe", found(0.5)), *failed)
    assert all(entry["saved_bytes"] is None for entry in found_document["methods"])
    assert "saved" not in table(found_document).lower()


def test_the_table_has_a_row_a_method_with_all_its_numbers(document):
    rows = lines_of(document(("recipe", found(0.5)), ("adamw_fused", found())))
    assert rows["galore (recipe)"][2:] == [
        "0.002", "9.50", "4.00", "50.0", "%", "0.0400", "0.0391..0.125", "12,346", "1.750", "1.800",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "seconds", "rate"),
    [(30_000, (100.0, 123.4, 1234.5), 1_234_567.0), (1, (0.0398, 0.0424, 0.0518), 9158.0)],
)
def test_the_table_fits_100_columns_whatever_it_holds(document, scale, seconds, rate):
    least, middle, most = seconds
    big = found(
        scale, step_seconds={"median": middle, "min": least, "max": most}, tokens_per_second=rate,
        losses=[1e-5] * 6, held_out_loss=1234.5,
    )  # fmt: skip
    long = "galore:rank=64,projection=svd,refresh_every=1000,scale=0.25"
    pairs = [("recipe", big), (long, big), ("adamw_fused", big), ("sgd", {"reason": "no " * 60})]
    lines = table(document(*pairs)).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    (cut,) = (line for line in lines if line.endswith(f"... is {long}"))
    assert sum(line.startswith(cut.split(" is ")[0] + " ") for line in lines) == 2, "in the table and below"


def test_a_method_that_failed_has_its_reason_instead_of_numbers(document, tmp_path):
    failed = document(("recipe", found()), ("sgd", {"reason": "out of memory: 3 GiB"}))
    assert "sgd was not measured: out of memory: 3 GiB" in table(failed)
    assert "sgd" not in lines_of(failed)
    write_comparison(failed, tmp_path)
    assert "sgd was not measured: out of memory: 3 GiB" in (tmp_path / "comparison.md").read_text()


def test_when_every_method_failed_the_report_says_why(document, tmp_path):
    failed = document(("recipe", {"reason": "refused: no"}), ("sgd", {"reason": "out of memory"}))
    write_comparison(failed, tmp_path)
    assert not list((tmp_path / "plots").iterdir())
    for text in (table(failed), (tmp_path / "report.html").read_text()):
        assert "galore (recipe) was not measured: refused: no" in text
        assert "sgd was not measured: out of memory" in text


def test_losses_that_do_not_compare_are_left_out(document):
    entry = found(losses_compare=False, held_out_loss=None, losses=[4.5, 9.87])
    text = table(document(("recipe", found()), ("adamw_fused_backward", entry)))
    assert "9.87" not in text
    assert "its losses do not" in text
    assert lines_of(document(("recipe", found()), ("adamw_fused_backward", entry)))["adamw_fused_backward"][
        -2:
    ] == ["-", "-"]


@pytest.mark.parametrize(("timed", "is_said"), [([3, 4, 6], True), ([3, 101, 102], False)])
def test_seconds_without_a_refresh_are_said_to_be_so(document, timed, is_said):
    text = " ".join(table(document(("recipe", found()), timed_steps=timed)).split())
    assert ("chooses its subspaces anew every 100 steps" in text) is is_said
    assert "median of 3 steps" in text
    assert "with adamw at lr 0.004" in text


def test_losses_that_are_not_finite_are_shown_and_drawn(document, tmp_path):
    broken = found(losses=[4.5, "NaN", "Infinity", 3.0, "NaN", "NaN"], held_out_loss="NaN")
    found_document = document(("recipe", broken))
    write_comparison(found_document, tmp_path)
    assert lines_of(found_document)["galore (recipe)"][-2:] == ["NaN", "NaN"]
    assert imread(tmp_path / "plots" / "loss.png").shape[1] == 1200


class Outside(HTMLParser):
    """Collects what a page asks for, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_nothing_from_outside(document, tmp_path):
    write_comparison(document(("recipe", found(0.5)), ("sgd", found())), tmp_path)
    page = Outside()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    assert len(page.references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert {"url(", "@import", "<script"}.isdisjoint((tmp_path / "report.html").read_text().split())
    text = " ".join(page.texts)
    for said in ("galore (recipe)", "12,346", "0.0391..0.125", "refresh_every 100", "torch 2.13", "812,345"):
        assert said in text


def test_the_report_is_rebuilt_from_the_document_alone(document, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_comparison(document(("recipe", found(0.5)), ("adamw_fused", found())), first)
    second.mkdir()
    assert not is_comparison(second)
    shutil.copy(first / "comparison.json", second)
    assert is_comparison(second)
    write_comparison(read_comparison(second), second)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(name) for name in names] == [
        "comparison.json", "comparison.md", "plots/loss.png", "plots/memory.png", "plots/seconds.png", "report.html",
    ]  # fmt: skip
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_picture_that_cannot_be_drawn_any_more_is_removed(document, tmp_path):
    write_comparison(document(("recipe", found())), tmp_path)
    write_comparison(document(("recipe", {"reason": "refused"})), tmp_path)
    assert not list((tmp_path / "plots").iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"methods": [', "is not JSON"),
        ("[1]", "is not a comparison"),
        ('{"methods": []}', "is not a comparison"),
        ('{"methods": [{"method": "recipe"}]}', "is not a comparison"),
    ],
)
def test_a_torn_document_is_refused(tmp_path, text, said):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_comparison(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_fault(document, tmp_path):
    (tmp_path / "plots").write_text("a file where a folder belongs")
    with pytest.raises(FaultError, match="cannot be written"):
        write_comparison(document(("recipe", found())), tmp_path)


def test_every_setting_is_in_the_document_defaults_too(recipe, document):
    settings = document(("recipe", found()))["methods"][0]["settings"]
    assert settings["rank"] == 8
    assert settings["betas"] == [0.9, 0.999]
    assert settings["fallback"] == {"name": "adamw", "lr": 4e-3}
    other = replace(recipe, train=replace(recipe.train, seed=7))
    assert Method("recipe", other).settings()["seed"] == 7
    json.dumps(document(("recipe", found())), allow_nan=False)


def test_the_names_of_the_pictures_are_links_of_the_markdown_page(document, tmp_path):
    write_comparison(document(("recipe", found())), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    for name in ("memory", "loss", "seconds"):
        assert f"(plots/{name}.png)" in text
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > Path(
            tmp_path / "comparison.md"
        ).stat().st_size
