"""The tables of published memory figures say what the code computes now."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_paper_tables.py"))
DOCUMENT = json.loads((RESULTS / "paper_tables.json").read_text())
WRITTEN = [row for table in DOCUMENT["tables"] for row in table["rows"]]
COMPUTED = [(row, table) for table in SCRIPT["tables"]() for row in table.rows]


def test_the_page_is_made_from_the_numbers():
    assert (RESULTS / "paper_tables.md").read_text() == SCRIPT["markdown"](DOCUMENT), (
        "run `make paper-tables`"
    )


def test_every_row_of_the_script_is_in_the_results_and_no_other():
    script = [(row.what, row.published, row.ours.simulated) for row, _ in COMPUTED]
    assert script == [(row["what"], row["published"], row["simulated"]) for row in WRITTEN]


def test_rows_that_need_no_simulation_are_up_to_date():
    for (row, table), written in zip(COMPUTED, WRITTEN, strict=True):
        if not row.ours.simulated:
            assert SCRIPT["compared"](row, table) == written, "run `make paper-tables`"


@pytest.mark.slow
def test_a_simulated_row_is_up_to_date():
    row, written = next(
        (row, written)
        for (row, _), written in zip(COMPUTED, WRITTEN, strict=True)
        if row.what == "1B, AdamW in backward, allocated"
    )
    assert row.ours.count() == pytest.approx(written["ours_bytes"], rel=0.01)


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: f"{row['cited']}: {row['what']}")
def test_every_published_figure_is_cited_and_its_difference_explained(row):
    assert re.match(r"(arXiv:\d{4}\.\d{5}(v\d+)?|https://\S+), \w", row["cited"])
    assert row["why"].endswith(".")
    assert row["difference"] == pytest.approx(
        row["ours_bytes"] / {"GB": 1e9, "GiB": 2**30}[row["reads_as"]] / float(row["published"]) - 1, abs=1e-4
    )


@pytest.mark.parametrize(("size", "rank"), [("60M", 128), ("1B", 512)])
def test_galore_state_is_the_formula_of_the_papers_table_1(size, rank):
    shape = {
        "60M": {"hidden": 512, "intermediate": 1376, "layers": 8},
        "1B": {"hidden": 2048, "intermediate": 5461, "layers": 24},
    }[size]
    h, i, layers = shape["hidden"], shape["intermediate"], shape["layers"]
    matrices = layers * (4 * (h * rank + 2 * h * rank) + 3 * (h * rank + 2 * i * rank))
    rest = 2 * (2 * 32000 * h + (2 * layers + 1) * h)
    tensors = layers * 9 + 3
    counted = 4 * tensors  # the step number of each
    assert SCRIPT["galore"](size).count() == 2 * (matrices + rest) + counted


def test_weights_are_those_of_a_model_with_memory():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_hidden_layers=8,
    )
    real = LlamaForCausalLM(config).bfloat16()
    assert SCRIPT["weights"]("60M").count() == sum(param.nbytes for param in real.parameters())
