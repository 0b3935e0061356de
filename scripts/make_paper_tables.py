"""Hold our memory figures against those that papers and READMEs publish.

    python scripts/make_paper_tables.py [--out docs/results]

Published figures are literals here, each with the place where it stands; a figure of ours is computed: weights and
optimizer state exactly, on models without memory, the rest by simulating the steps for CUDA. Writes paper_tables.json
and paper_tables.md. A new optimizer needs a row here, nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.simulated_run import simulate_run
from lowmem.memory.readings import Measured
from lowmem.optim.build import build_optimizer
from lowmem.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
UNITS = {"GB": 10**9, "GiB": 2**30}
BF16, FP32 = torch.bfloat16, torch.float32


def llama(hidden: int, intermediate: int, heads: int, layers: int, **other: Any) -> PreTrainedConfig:
    shape = dict(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads)
    return LlamaConfig(**{"vocab_size": 32000, **shape, "num_hidden_layers": layers, **other})


SHAPES: dict[str, PreTrainedConfig] = {  # 60M to 7B: configs/llama_*.json of jiaweizzhao/GaLore
    "60M": llama(512, 1376, 8, 8),
    "130M": llama(768, 2048, 12, 12),
    "350M": llama(1024, 2736, 16, 24),
    "1B": llama(2048, 5461, 32, 24),
    "7B": llama(4096, 11008, 32, 32),
    "3B": llama(
        *(3072, 8192, 24, 28),
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "GPT-2 XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
GALORE_RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512}


@dataclass(frozen=True)
class Ours:
    """A figure of ours in bytes, computed when asked for."""

    count: Callable[[], int]
    simulated: bool = False

    def __add__(self, other: Ours) -> Ours:
        return Ours(lambda: self.count() + other.count())

    def __sub__(self, other: Ours) -> Ours:
        return Ours(lambda: self.count() - other.count())


@cache
def model(shape: str, dtype: torch.dtype = BF16) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)


def weights(shape: str, dtype: torch.dtype = BF16) -> Ours:
    return Ours(lambda: sum(param.nbytes for param in model(shape, dtype).parameters()))


def state(shape: str, name: str, dtype: torch.dtype = BF16, **settings: Any) -> Ours:
    return Ours(lambda: build_optimizer(model(shape, dtype), name, lr=1e-3, **settings).state_bytes())


def adamw(shape: str) -> Ours:
    return state(shape, "adamw")


def galore(shape: str) -> Ours:
    return state(shape, "galore", rank=GALORE_RANKS[shape])


@cache
def simulated(shape: str, tokens: int, *overrides: str, rows: int = 1, how: str = "adamw") -> Measured:
    """Two steps on CUDA of `rows` full rows of `tokens`. `how` is one of our optimizers or of torch's AdamW."""
    variants = adamw_variants(lr=1e-4, weight_decay=0.0)
    recipe = load_recipe(
        ROOT / "recipes" / f"llama32_1b_{'adamw' if how in variants else how}.yaml",
        [
            *("data.packing=false", "train.gradient_accumulation_steps=1", "train.max_grad_norm=null"),
            *(f"data.max_length={tokens}", f"train.per_device_batch_size={rows}", *overrides),
        ],
        files_must_exist=False,
    )
    steps = [[planned_batch(recipe, full_rows=True)]] * 2
    run = simulate_run(recipe, steps, on_cuda=True, config=SHAPES[shape], optimizer_of=variants.get(how))
    return run.measured


def peak(shape: str, tokens: int, *overrides: str, **chosen: Any) -> Ours:
    return Ours(lambda: simulated(shape, tokens, *overrides, **chosen).peak_bytes, simulated=True)


def reserved(shape: str, tokens: int, *overrides: str, **chosen: Any) -> Ours:
    return Ours(lambda: simulated(shape, tokens, *overrides, **chosen).reserved_bytes or 0, simulated=True)


def activations(shape: str, tokens: int, *overrides: str, rows: int = 1) -> Ours:
    """What forward leaves alive. With updates inside backward the fullest moment is where backward begins."""
    run = ("adamw_fused_backward", rows)
    return Ours(
        lambda: simulated(shape, tokens, *overrides, how=run[0], rows=run[1]).parts["activations"],
        simulated=True,
    )


@dataclass(frozen=True)
class Row:
    """A published figure (all its digits) and ours. `why` explains the difference where the digits differ."""

    what: str
    where: str  # in the table's source
    published: str
    ours: Ours
    why: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    source: str  # arXiv id or address
    unit: str  # as published: G, GB or GiB
    reads_as: str  # GB or GiB, which the source's exact figures fit; "nearer" where it mixes them
    conditions: str
    rows: list[Row]


def by_size(
    what: str, where: str, figures: str, ours: Callable[[str], Ours], why: str = "", **whys: str
) -> list[Row]:
    """The four published sizes in order; `_350M="..."` explains one of them."""
    return [
        Row(f"{what}, {size}", where, published, ours(size), whys.get(f"_{size}", why))
        for size, published in zip(GALORE_RANKS, figures.split(), strict=True)
    ]


def nominal(count: str, times: str, shape: str) -> str:
    return f"{count} nominal parameters x {times}; the shape has {weights(shape).count() / 2e9:.3f} billion."


def tables() -> list[Table]:
    return [galore_estimates(), galore_runs(), sgd_sai(), scale(), lomo(), torchtune(), llama_factory()]


def galore_estimates() -> Table:
    states, totals = "Table 6b", "Table 2"
    formula = (
        "Ours is the paper's Table 1, mr + 2nr a matrix, and 2mn for embeddings, head and norms; appendix C.2 says "
        "no more than that original and low-rank parameters were counted."
    )
    summed = "The published total is the sum of Tables 6a and 6b up to rounding, so the difference is that of Table 6b."
    return Table(
        "GaLore: estimates of weights and optimizer state",
        "arXiv:2403.03507v2",
        "G",
        "nearer",
        "LLaMA shapes of the authors' repository (its 1B has 24 layers and 32 heads, which makes 1.3 billion "
        "parameters; the paper's Table 5 swaps the two), bfloat16, GaLore ranks 128, 256, 256 and 512 (Table 2).",
        [
            *by_size(
                *("weights", "Table 6a", "0.12 0.25 0.68 2.60", weights),
                _350M=nominal("350 million", "2 bytes / 1.024", "350M"),
                _1B=nominal("1.3 billion", "2 bytes", "1B"),
            ),
            *by_size(
                *("AdamW state", states, "0.23 0.51 1.37 5.20", adamw),
                _130M=nominal("130 million", "4 bytes / 1.024", "130M"),
                _1B=nominal("1.3 billion", "4 bytes", "1B"),
            ),
            *by_size("GaLore state", states, "0.13 0.28 0.54 1.78", galore, formula),
            *by_size(
                *(
                    "weights and AdamW state",
                    totals,
                    "0.36 0.76 2.06 7.80",
                    lambda size: weights(size) + adamw(size),
                ),
                _60M="The paper's own parts, 0.12 and 0.23, make 0.35.",
                _130M=nominal("130 million", "6 bytes / 1.024", "130M"),
                _1B=nominal("1.3 billion", "6 bytes", "1B"),
            ),
            *by_size(
                *("weights and GaLore state", totals, "0.24 0.52 1.22 4.38"),
                *(lambda size: weights(size) + galore(size), summed),
            ),
        ],
    )


def galore_runs() -> Table:
    plain = ("train.loss=plain", "train.activation_checkpointing=false")
    uncounted = "The paper gives no count; ours is every tensor that forward leaves for backward."
    quotient = "A published saving, 37.92G, over its share, 63.3 %, without parts; it lies between fused and foreach."
    counter = (
        "The paper names neither the counter it read nor its torch; a process also holds a CUDA context."
    )
    return Table(
        "GaLore: runs with AdamW",
        "arXiv:2403.03507v2",
        "G",
        "GB",
        "bfloat16, one row of 2048 tokens (introduction) or 256 (the rest), no activation checkpointing unless said; "
        "ours with sdpa attention and whole logits. torch's default AdamW is foreach, which holds a copy in its step.",
        [
            Row("7B, weights", "introduction", "14", weights("7B"), nominal("7 billion", "2 bytes", "7B")),
            Row(
                *("7B, AdamW state and gradients", "introduction", "42", adamw("7B") + weights("7B")),
                nominal("7 billion", "6 bytes", "7B"),
            ),
            Row("7B, activations", "introduction", "2", activations("7B", 2048, *plain), uncounted),
            Row(
                *("7B, activations, checkpointed", "introduction", "2"),
                *(activations("7B", 2048, plain[0]), uncounted),
            ),
            Row("7B, gradients", "section 5.5", "13.5", weights("7B")),
            Row("7B, total, AdamW fused", "section 5.5", "59.9", peak("7B", 256, *plain), quotient),
            Row(
                *("7B, total, AdamW foreach", "section 5.5", "59.9"),
                *(peak("7B", 256, *plain, how="adamw_foreach"), quotient),
            ),
            *(
                Row(f"1B, {label}, {kind}", "Table 11", published, ours("1B", 256, *plain, how=how), counter)
                for label, how, published in (
                    ("AdamW foreach", "adamw_foreach", "13.60"),
                    ("AdamW in backward", "adamw_fused_backward", "9.63"),
                )
                for kind, ours in (("allocated", peak), ("reserved", reserved))
            ),
        ],
    )


def sgd_sai() -> Table:
    def saved(shape: str) -> Ours:
        return state(shape, "adamw", FP32) - state(shape, "sgd_sai", FP32)

    why = "Ours is one float32 number a parameter; how theirs was read, and on which shape, is not said."
    return Table(
        "SGD-SaI: state saved against AdamW",
        "arXiv:2412.11768",
        "GB",
        "GiB",
        "float32 weights and state; GPT-2 XL with tied embeddings, LLaMA-2-7B.",
        [
            Row("GPT-2 1.5B", "abstract", "5.93", saved("GPT-2 XL"), why),
            Row("LLaMA-2-7B", "abstract", "25.15", saved("7B"), why),
        ],
    )


def scale() -> Table:
    source = "README, numerical results"
    return Table(
        "SCALE: weights and state of AdamW and GaLore",
        "https://github.com/OptimAI-Lab/Minimalist_LLM_Pretraining",
        "G",
        "GB",
        "The same LLaMA shapes, bfloat16; GaLore with the ranks of its own paper, since the README names none.",
        [
            *by_size(
                *("AdamW", source, "0.35 0.81 2.21 8.04", lambda size: weights(size) + adamw(size)),
                _130M="The published total is that of rounded parts, 0.27 + 0.54.",
                _1B="The published total is that of rounded parts, 2.68 + 5.36.",
            ),
            *by_size(
                *("GaLore", source, "0.28 0.61 1.59 4.76", lambda size: weights(size) + galore(size)),
                _350M="The three other sizes agree with these ranks; here theirs must have been above 256.",
            ),
        ],
    )


def lomo() -> Table:
    whole = ("train.loss=plain", "train.activation_checkpointing=false")
    kept = "Ours is what today's transformers model saves; the paper does not say what its model did."
    return Table(
        "LOMO: LLaMA-7B, part by part",
        "arXiv:2306.09782",
        "GB",
        "GiB",
        "8 rows of 512 tokens, mixed precision: 16-bit weights and gradients, and optimizer states that include a "
        "float32 copy of the weights, so those of ours are float32 weights and state together.",
        [
            Row("weights", "Table 1", "12.55", weights("7B")),
            Row("gradients", "Table 1", "12.55", weights("7B")),
            Row(
                "AdamW, copy and state", "Table 1", "75.31", weights("7B", FP32) + state("7B", "adamw", FP32)
            ),
            Row("SGD, copy and state", "Table 1", "25.10", weights("7B", FP32) + state("7B", "sgd", FP32)),
            Row("activations, sdpa", "Table 1", "45.61", activations("7B", 512, *whole, rows=8), kept),
            Row(
                *("activations, eager attention", "Table 1", "45.61"),
                *(activations("7B", 512, *whole, "model.attn=eager", rows=8), kept),
            ),
            Row(
                "activations, checkpointed", "Table 1", "1.79", activations("7B", 512, whole[0], rows=8), kept
            ),
        ],
    )


def torchtune() -> Table:
    where = "README, optimization flags"
    logits = f"{2 * 4096 * SHAPES['3B'].vocab_size * 2 / UNITS['GiB']:.1f} GiB"
    return Table(
        "torchtune: Llama 3.2 3B, peak of active memory",
        "https://github.com/pytorch/torchtune",
        "GiB",
        "GiB",
        "bfloat16, AdamW, 2 rows of 4096 tokens, measured on an A100; ours allocated, fused AdamW, full rows. Rows "
        "that differ from another by compiling, offloading or 8-bit states alone are left out.",
        [
            Row(
                *("packed dataset", where, "60.0"),
                peak("3B", 4096, "train.loss=plain", "train.activation_checkpointing=false", rows=2),
                "Two implementations of one model, which save different copies for backward.",
            ),
            Row(
                *(
                    "compiled, chunked loss, activation checkpointing",
                    where,
                    "24.9",
                    peak("3B", 4096, rows=2),
                ),
                "Theirs is compiled, ours is not.",
            ),
            Row(
                *("the same, updates in backward", where, "23.1"),
                peak("3B", 4096, rows=2, how="adamw_fused_backward"),
                f"Its chunked loss is given the logits of all tokens ({logits} in bfloat16); ours never holds them.",
            ),
        ],
    )


def llama_factory() -> Table:
    where = "README, hardware requirement"
    return Table(
        "LLaMA-Factory: estimates for 7B",
        "https://github.com/hiyouga/LLaMA-Factory",
        "GB",
        "GB",
        "Marked as estimates there, without length, batch or rank. Ours: bfloat16, one row of 1024 tokens, "
        "activation checkpointing, GaLore with rank 128, updates after backward.",
        [
            Row(
                *("full, pure_bf16", where, "60", peak("7B", 1024)),
                "The README's rule is 8 bytes a parameter, rounded up: weights, gradients and AdamW's state.",
            ),
            Row(
                *("GaLore", where, "16", peak("7B", 1024, "optimizer.rank=128", how="galore")),
                "The README's rule is 2 bytes a parameter, the weights alone; the gradients are as much again.",
            ),
        ],
    )


def compared(row: Row, table: Table) -> dict[str, Any]:
    """The row as plain data: our bytes, the unit the published figure is read in, and the difference in it."""
    ours, figure = row.ours.count(), float(row.published)
    units = UNITS if table.reads_as == "nearer" else [table.reads_as]
    reads_as = min(units, key=lambda unit: abs(ours / UNITS[unit] - figure))
    decimals = len(row.published.partition(".")[2])
    agrees = f"{ours / UNITS[reads_as]:.{decimals}f}" == row.published
    assert agrees or row.why, f"{row.what}: {ours / UNITS[reads_as]} is not {row.published}; say why"
    return {
        "what": row.what,
        "cited": f"{table.source}, {row.where}",
        "published": row.published,
        "ours_bytes": ours,
        "simulated": row.ours.simulated,
        "reads_as": reads_as,
        "difference": round(ours / UNITS[reads_as] / figure - 1, 4),
        "why": "Equal to the published digits." if agrees else row.why,
    }


def document() -> dict[str, Any]:
    """Every table with its rows compared, as plain data."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tables": [
            {
                "title": table.title,
                "source": table.source,
                "unit": table.unit,
                "conditions": table.conditions,
                "rows": [compared(row, table) for row in table.rows],
            }
            for table in tables()
        ],
    }


INTRODUCTION = """# Published memory figures and ours

Figures that papers and READMEs publish, against what lowmem computes for the same shapes and settings, as far as the
source states them. Weights, gradients and optimizer state of ours are exact, from the shapes and
`optimizer.state_bytes()`; rows marked * are simulated steps on CUDA, which are plans and not measurements. Sources
write "G" or "GB" for 10^9 and for 2^30 bytes alike: "reads as" is the unit that a source's exact figures fit (row by
row where one mixes them), and the difference is ours against the published figure in that unit.
"""


def markdown(document: dict[str, Any]) -> str:
    """The document as a page."""
    lines = [INTRODUCTION]
    for table in document["tables"]:
        lines += [f"## {table['title']}", "", f"Source: {link(table['source'])}. {table['conditions']}", ""]
        lines += ["| what | where | published | ours, GB | ours, GiB | reads as | difference | why |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in table["rows"]:
            cells = [
                row["what"] + (" *" if row["simulated"] else ""),
                row["cited"].removeprefix(table["source"] + ", "),
            ]
            cells += [f"{row['published']} {table['unit']}"]
            cells += [f"{row['ours_bytes'] / size:.3f}" for size in UNITS.values()]
            cells += [row["reads_as"], f"{row['difference']:+.1%}", row["why"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"Made by `make paper-tables` (`python scripts/make_paper_tables.py`) with torch {document['torch']} and "
        f"transformers {document['transformers']}; [the bytes](paper_tables.json)."
    )
    return "\n".join([*lines, ""])


def link(source: str) -> str:
    return f"[{source}](https://arxiv.org/abs/{source[6:]})" if source.startswith("arXiv:") else f"<{source}>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    out = parser.parse_args().out
    found = document()
    (out / "paper_tables.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "paper_tables.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
