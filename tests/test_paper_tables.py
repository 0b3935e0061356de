"""The tables of published memory figures say what the code computes now."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import make_paper_tables  # noqa: E402
from paper_tables.figures import FP32, UNITS, state, weights  # noqa: E402
from paper_tables.state_tables import SCALE, galore  # noqa: E402

RESULTS = ROOT / "docs" / "results"
DOCUMENT = json.loads((RESULTS / "paper_tables.json").read_text())
WRITTEN = [row for table in DOCUMENT["tables"] for row in table["rows"]]
COMPUTED = [(row, table) for table in make_paper_tables.tables() for row in table.rows]


def test_the_page_is_made_from_the_numbers():
    assert (RESULTS / "paper_tables.md").read_text() == make_paper_tables.markdown(DOCUMENT), (
        "run `make paper-tables`"
    )


def test_every_row_of_the_script_is_in_the_results_and_no_other():
    script = [(row.what, row.published, row.ours.simulated) for row, _ in COMPUTED]
    assert script == [(row["what"], row["published"], row["simulated"]) for row in WRITTEN]


def test_rows_that_need_no_simulation_are_up_to_date():
    for (row, table), written in zip(COMPUTED, WRITTEN, strict=True):
        if not row.ours.simulated:
            assert make_paper_tables.compared(row, table) == written, "run `make paper-tables`"


@pytest.mark.parametrize(
    ("what", "shape", "optimizer"),
    [
        ("7B, total, AdamW fused", "7B", {"name": "adamw"}),
        ("compiled, chunked loss, activation checkpointing", "3B", {"name": "adamw"}),
        ("full, pure_bf16", "7B", {"name": "adamw"}),
        ("GaLore", "7B", {"name": "galore", "rank": 128}),
    ],
)
def test_a_run_that_updates_after_backward_holds_weights_gradients_and_state_at_once(what, shape, optimizer):
    least = 2 * weights(shape).count() + state(shape, **optimizer).count()
    (written,) = [row for row in WRITTEN if row["what"] == what and row["simulated"]]
    assert written["ours_bytes"] > least


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
        row["ours_bytes"] / UNITS[row["reads_as"]] / float(row["published"]) - 1, abs=1e-4
    )


@pytest.mark.parametrize("row", [row for row in WRITTEN if not row["simulated"]], ids=lambda row: row["what"])
def test_a_figure_that_is_said_to_be_equal_has_the_published_digits(row):
    ours = row["ours_bytes"] / UNITS[row["reads_as"]]
    equal = f"{ours:.{len(row['published'].partition('.')[2])}f}" == row["published"]
    assert equal == (row["why"] == "Equal to the published digits.")


@dataclass(frozen=True)
class Llama:
    """A shape by its numbers alone, for counts by hand."""

    hidden: int
    intermediate: int
    layers: int

    @property
    def linear(self) -> int:
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def head(self) -> int:
        return 32000 * self.hidden

    @property
    def rest(self) -> int:
        """What is in no linear layer of attention or MLP."""
        return 2 * self.head + self.norms

    @property
    def tensors(self) -> int:
        return 9 * self.layers + 3


LLAMAS = {
    "60M": Llama(512, 1376, 8),
    "130M": Llama(768, 2048, 12),
    "350M": Llama(1024, 2736, 24),
    "1B": Llama(2048, 5461, 24),
    "7B": Llama(4096, 11008, 32),
}
SIZES = [pytest.param(size, shape, id=size) for size, shape in LLAMAS.items()]
COUNTER_BYTES = 4  # of the step number that a tensor with state has


@pytest.mark.parametrize(("size", "rank"), [("60M", 128), ("1B", 512)])
def test_galore_state_is_the_formula_of_the_papers_table_1(size, rank):
    shape = LLAMAS[size]
    h, i = shape.hidden, shape.intermediate
    matrices = shape.layers * (4 * (h * rank + 2 * h * rank) + 3 * (h * rank + 2 * i * rank))
    counted = COUNTER_BYTES * shape.tensors
    assert galore(size).count() == 2 * (matrices + 2 * shape.rest) + counted


@pytest.mark.parametrize(("size", "shape"), SIZES)
def test_swan_and_sinkgd_have_adams_state_of_embedding_head_and_norms_alone(size, shape):
    without = COUNTER_BYTES * shape.tensors
    assert state(size, "swan").count() == state(size, "sinkgd").count() == 4 * shape.rest + without


@pytest.mark.parametrize(("size", "shape"), SIZES)
def test_scale_has_momentum_of_the_head_and_adams_state_of_norms_alone(size, shape):
    without = COUNTER_BYTES * shape.tensors
    assert state(size, "sinkgd", **SCALE).count() == 2 * shape.head + 4 * shape.norms + without


FRUGAL = {"projection": "block", "order": "descending", "density": 0.25}


@pytest.mark.parametrize(("size", "shape"), SIZES)
def test_frugal_as_its_authors_pretrain_has_state_of_a_quarter_of_the_linear_layers(size, shape):
    quarter = 8 * (shape.rest + shape.linear // 4)
    counters = COUNTER_BYTES * shape.tensors
    assert state(size, "frugal", FP32, **FRUGAL).count() == quarter + counters
    assert state(size, "frugal", FP32, **FRUGAL, residual="none").count() == quarter + counters
    assert state(size, "frugal", FP32, density=0.0).count() == 8 * shape.rest + counters
    columns = state(size, "frugal", FP32, density=0.25).count()
    assert quarter < columns < 1.001 * quarter + counters


@pytest.mark.parametrize(("size", "shape"), SIZES)
def test_badam_with_a_quarter_of_the_layers_active_has_as_much(size, shape):
    active = shape.layers // 4
    counters = COUNTER_BYTES * (7 * active + 2 * shape.layers + 3)
    found = state(size, "block_adam", FP32, active=active, fallback={"name": "adamw"}).count()
    assert found == 8 * (shape.rest + shape.linear // 4) + counters


# Counted by hand from the settings of the sources: all weights in bfloat16 or, for FRUGAL and BAdam, in float32.
COUNTED = {  # GiB, of 60M, 130M, 350M and 1B
    "SWAN, weights and state (arXiv:2412.13148)": (
        "0.23 0.43 0.93 2.98",
        lambda size: weights(size) + state(size, "swan"),
    ),
    "AdamW, float32 state": ("0.43 1.00 2.74 9.98", lambda size: state(size, "adamw", FP32)),
    "FRUGAL, density 0.25 (arXiv:2411.07837)": (
        "0.29 0.52 1.05 3.23",
        lambda size: state(size, "frugal", FP32, **FRUGAL),
    ),
    "FRUGAL, density 0 (arXiv:2411.07837)": (
        "0.24 0.37 0.49 0.98",
        lambda size: state(size, "frugal", FP32, density=0.0),
    ),
    "BAdam, a quarter of the layers (arXiv:2404.02827)": (
        "0.29 0.52 1.05 3.23",
        lambda size: state(
            *(size, "block_adam", FP32),
            active=LLAMAS[size].layers // 4,
            fallback={"name": "adamw"},
        ),
    ),
}


@pytest.mark.parametrize("what", COUNTED)
def test_state_at_the_four_sizes_is_what_the_papers_settings_make(what):
    figures, ours = COUNTED[what]
    assert [f"{ours(size).count() / 2**30:.2f}" for size in list(LLAMAS)[:4]] == figures.split()


def test_sgd_sai_saves_one_float32_number_a_parameter_of_llama_2_7b():
    saved = state("7B", "adamw", FP32).count() - state("7B", "sgd_sai", FP32).count()
    assert f"{saved / 2**30:.1f}" == "25.1"
    shape = LLAMAS["7B"]
    assert saved == pytest.approx(4 * (shape.linear + shape.rest), abs=8 * shape.tensors)


def test_weights_are_those_of_a_model_with_memory():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_hidden_layers=8,
    )
    real = LlamaForCausalLM(config).bfloat16()
    assert weights("60M").count() == sum(param.nbytes for param in real.parameters())
