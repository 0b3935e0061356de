"""Published figures of whole runs, which ours are simulated for: steps on CUDA, planned and not measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.planned_batches import planned_batch
from lowmem.hf.simulated_run import simulate_run
from lowmem.memory.readings import Measured
from lowmem.recipe.load import load_recipe
from paper_tables.figures import FP32, SHAPES, UNITS, Ours, Row, Table, nominal, state, weights

RECIPES = Path(__file__).parents[2] / "recipes"


def run_tables() -> list[Table]:
    return [galore_runs(), lomo(), torchtune(), llama_factory()]


@cache
def simulated(shape: str, tokens: int, *overrides: str, rows: int = 1, how: str = "adamw") -> Measured:
    """Two steps on CUDA of `rows` full rows of `tokens`, updates after backward unless `how` says otherwise.

    `how` is one of our optimizers or of torch's AdamW.
    """
    variants = adamw_variants(lr=1e-4, weight_decay=0.0)
    recipe = load_recipe(
        RECIPES / f"llama32_1b_{'adamw' if how in variants else how}.yaml",
        [
            *("data.packing=false", "train.gradient_accumulation_steps=1", "train.max_grad_norm=null"),
            "train.execution=plain",
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
                *(
                    "7B, AdamW state and gradients",
                    "introduction",
                    "42",
                    state("7B", "adamw") + weights("7B"),
                ),
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
