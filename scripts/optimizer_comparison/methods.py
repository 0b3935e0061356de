"""What is compared: optimizers with their settings, and the learning rates to begin the search with."""

from __future__ import annotations

from dataclasses import dataclass

ADAMW_GRID = (2e-3, 4e-3)
RANK = 32  # half of the width of 64


@dataclass(frozen=True)
class Method:
    """`settings` are overrides of the recipe; the grid grows by itself while its best value lies at an edge."""

    name: str
    grid: tuple[float, ...]
    settings: tuple[str, ...]


def of(optimizer: str, grid: tuple[float, ...], *settings: str, name: str | None = None) -> Method:
    return Method(name or optimizer, grid, (f"optimizer.name={optimizer}", *settings))


QUARTER = ("optimizer.rank=16", "optimizer.refresh_every=20")
STATELESS_REST = "optimizer.fallback={name: adamw}"

LOW_RANK = (f"optimizer.rank={RANK}", "optimizer.refresh_every=20", "optimizer.on_refresh=rotate")
INT8 = "model.weights=int8"
METHODS = (
    of("adamw", ADAMW_GRID),
    of("galore", ADAMW_GRID, *LOW_RANK),
    of("q_galore", ADAMW_GRID, *LOW_RANK, INT8, name="q_galore int8"),
    of(
        "q_galore",
        ADAMW_GRID,
        *LOW_RANK,
        INT8,
        "optimizer.rounding=nearest",
        name="q_galore int8, to nearest",
    ),
    of("galore", ADAMW_GRID, *QUARTER, "optimizer.on_refresh=rotate", name="galore, rank 1/4"),
    of("fira", ADAMW_GRID, *QUARTER, name="fira, rank 1/4"),
    of("apollo", ADAMW_GRID, *QUARTER, name="apollo, rank 1/4"),
    of(
        "frugal",
        ADAMW_GRID,
        "optimizer.density=0.25",
        "optimizer.refresh_every=20",
        name="frugal, 1/4 of columns",
    ),
    of("dct_adamw", ADAMW_GRID, "optimizer.rank=16", name="dct_adamw, rank 1/4"),
    of(
        "galore",
        ADAMW_GRID,
        *QUARTER,
        "optimizer.refresh_every=100000",
        name="galore, rank 1/4, never refreshed",
    ),
    of("sgd", (0.1, 0.2)),
    of("sgd", (0.02, 0.04), "optimizer.momentum=0.9", name="sgd, momentum 0.9"),
    of(
        "sgd",
        (0.2, 0.4),
        "optimizer.momentum=0.9",
        "optimizer.dampening=0.9",
        name="sgd, momentum 0.9 of sgd_sai",
    ),
    of("sgd_sai", (3.2e-3, 6.4e-3)),
    of("sgd_sai", (3.2e-3, 6.4e-3), "optimizer.momentum=0.0", name="sgd_sai, no momentum"),
    of(
        "sgd_sai",
        (3.2e-3, 6.4e-3),
        "optimizer.momentum_start=zero",
        name="sgd_sai, momentum from zero",
    ),
    of(
        "sgd_sai",
        (3.2e-3, 6.4e-3),
        "train.lr_scheduler.warmup_steps=20",
        name="sgd_sai, 20 steps of warm-up",
    ),
    of("block_adam", ADAMW_GRID, "optimizer.refresh_every=10"),
    of(
        "block_adam",
        ADAMW_GRID,
        "optimizer.refresh_every=10",
        "optimizer.active=3",
        name="block_adam, 3 of 6 blocks",
    ),
    of("muon", ADAMW_GRID, STATELESS_REST),
    of("swan", ADAMW_GRID, STATELESS_REST),
    of("sinkgd", ADAMW_GRID, STATELESS_REST),
    of("sinkgd", ADAMW_GRID, STATELESS_REST, INT8, name="sinkgd int8"),
    of("adafactor", ADAMW_GRID),
    of("adafactor", ADAMW_GRID, INT8, name="adafactor int8"),
)


def method(name: str) -> Method:
    return next(each for each in METHODS if each.name == name)
