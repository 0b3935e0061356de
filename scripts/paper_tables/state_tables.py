"""Published figures of weights and optimizer state, which ours are computed for exactly, on models without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paper_tables.figures import FP32, Ours, Row, Table, by_size, nominal, state, weights

GALORE_RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512}
SCALE = {  # rows of matrices, momentum for the head alone, columns of the embedding
    "normalize": "row",
    "head": {"name": "sinkgd", "momentum": 0.9},
    "fallback": {"name": "sinkgd", "normalize": "column"},
}


def state_tables() -> list[Table]:
    return [galore_estimates(), sgd_sai(), scale()]


def adamw(shape: str) -> Ours:
    return state(shape, "adamw")


def galore(shape: str) -> Ours:
    return state(shape, "galore", rank=GALORE_RANKS[shape])


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
    of_parts = "The published total is that of rounded parts, "
    rank_384 = "The README names no rank; with 384 the rounded parts, 0.74 + 0.85, make the published total."
    no_basis = "The published figure is GaLore's; APOLLO draws its projection from a seed, and at 7B none is counted."
    mini = "The published figure is SWAN's; ours has the two moments of rank 1 too."

    def total(name: str, **settings: Any) -> Callable[[str], Ours]:
        return lambda size: weights(size) + state(size, name, **settings)

    def ranked(name: str) -> Callable[[str], Ours]:
        return lambda size: total(name, rank=GALORE_RANKS[size])(size)

    return Table(
        "SCALE: weights and state of eight optimizers",
        "https://github.com/OptimAI-Lab/Minimalist_LLM_Pretraining",
        "G",
        "GB",
        "The same LLaMA shapes, bfloat16; ranks of GaLore's paper unless said, since the README names none. Embedding, "
        "head and norms have Adam's state, but with Muon, whose published figures are one moment for every parameter, "
        "and SCALE, which has momentum for the head and Adam for norms alone. SinkGD's state is SWAN's.",
        [
            *by_size(
                *("AdamW", source, "0.35 0.81 2.21 8.04", total("adamw")),
                _130M=of_parts + "0.27 + 0.54.",
                _1B=of_parts + "2.68 + 5.36.",
            ),
            *by_size(
                *("Muon, momentum for the rest", source, "0.23 0.54 1.47 5.36"),
                total("muon", fallback={"name": "sgd", "momentum": 0.9}),
            ),
            *by_size("GaLore", source, "0.28 0.61 1.59 4.76", ranked("galore"), _350M=rank_384),
            Row("GaLore of rank 384, 350M", source, "1.59", total("galore", rank=384)("350M"), rank_384),
            *by_size("Fira", source, "0.28 0.61 1.59 4.76", ranked("fira"), _350M=rank_384),
            *by_size("SWAN", source, "0.25 0.46 1.00 3.20", total("swan")),
            *by_size("APOLLO", source, "0.28 0.61 1.59 4.76", ranked("apollo"), no_basis),
            Row(
                *("APOLLO of rank 256, 7B", source, "16.14", total("apollo", rank=256)("7B")),
                "The README names no rank; of powers of two 256 is nearest, and leaves the last digit.",
            ),
            *by_size("APOLLO-Mini", source, "0.25 0.46 1.00 3.20", total("apollo", rank=1), mini),
            Row("APOLLO-Mini, 7B", source, "14.53", total("apollo", rank=1)("7B")),
            *by_size("SCALE", source, "0.15 0.32 0.80 2.81", total("sinkgd", **SCALE)),
            Row("SCALE, 7B", source, "13.74", total("sinkgd", **SCALE)("7B")),
        ],
    )
