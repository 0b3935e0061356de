"""`lowmem eval`: how good a run's model, or a recipe's untrained one, is on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_columns, print_json


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "eval",
        "Loss (nats a token), perplexity and exact match of generated answers on the rows of data.eval.",
    )
    parser.add_target()
    parser.add_overrides()
    parser.add_json()
    options = parser.read(arguments)
    from lowmem.hf.evaluation import evaluate

    metrics = evaluate(options.target, options.overrides)
    if options.json:
        print_json(metrics)
    else:
        print_columns([(name, _shown(value)) for name, value in metrics.items()])
    return 0


def _shown(value: float | None) -> str:
    if value is None:
        return "none (rows of format text have no answers to compare)"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
