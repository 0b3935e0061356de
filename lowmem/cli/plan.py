"""`lowmem plan`: what a recipe will need on a GPU, and whether it fits."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json
from lowmem.errors import RecipeError
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

DOES_NOT_FIT = 3


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "plan",
        "Simulate the training steps of a recipe without weights, data or a GPU, and say what they need. "
        "Only the configuration of the model is read. Exit code 3: it does not fit the card.",
    )
    parser.add_recipe()
    parser.add_overrides()
    parser.add_argument("--gpu", metavar="CARD", help="a size (12GiB) or a card's name (rtx4070)")
    parser.add_argument("--explain", action="store_true", help="list the largest tensors alive at the peak")
    parser.add_argument(
        "--full-rows", action="store_true", help="rows without padding or packing: no attention mask"
    )
    parser.add_argument("--formula", action="store_true", help="estimate in a second instead of simulating")
    parser.add_argument(
        "--search", action="store_true", help="with --gpu: how long and how many rows each method can train"
    )
    parser.add_argument(
        "--world", metavar="N", type=int, help="of N processes that train together, the fullest, by formula"
    )
    parser.add_argument(
        "--strategy",
        metavar="NAME",
        help="with --world: ddp, fsdp2, zero1, zero2 or zero3, or the recipe's own",
    )
    parser.add_argument("--png", metavar="FILE", help="draw the parts and the baselines into FILE")
    parser.add_json()
    options = parser.read(arguments)
    recipe = load_recipe(options.recipe, options.overrides, files_must_exist=False)
    if options.png is not None and not Path(options.png).absolute().parent.is_dir():
        raise RecipeError(f"lowmem plan: --png {options.png}: there is no folder {Path(options.png).parent}.")
    if options.search and options.world is not None:
        raise RecipeError("lowmem plan: --search is of one device. Leave out --world, or --search.")
    if options.search:
        return _search(recipe, options)
    from lowmem.hf.plan import plan

    found = plan(
        recipe,
        gpu=options.gpu,
        full_rows=options.full_rows,
        formula=options.formula,
        world=options.world,
        strategy=options.strategy,
    )
    if options.png is not None:
        from lowmem.memory.plots import plot_memory

        plot_memory(found.document, options.png)
    if options.json:
        print_json(found.document)
    else:
        from lowmem.memory.plan_text import plan_text

        print(plan_text(found.document, title=_title(found.document), explain=options.explain, bar=_bar()))
    return DOES_NOT_FIT if found.fits is False else 0


def _search(recipe: Recipe, options: Namespace) -> int:
    if options.gpu is None:
        raise RecipeError(
            "lowmem plan: --search needs a card to search for, such as --gpu 12GiB or --gpu rtx4070"
        )
    from lowmem.hf.plan import what_fits
    from lowmem.memory.search_text import search_text

    document = what_fits(recipe, gpu=options.gpu, full_rows=options.full_rows)
    if options.json:
        print_json(document)
    else:
        print(search_text(document))
    return 0 if any(found["longest"] for found in document["methods"]) else DOES_NOT_FIT


def _title(document: dict[str, Any]) -> str:
    at = document["conditions"]
    trained = (
        "all trained"
        if at["trained_parameters"] == at["parameters"]
        else f"{at['trained_parameters']:,} trained"
    )
    of_each = " in each process" if at["world_size"] > 1 else ""
    return (
        f"{at['model']}, {at['parameters']:,} parameters, {trained}, {at['dtype']}, {at['optimizer']}; "
        f"{at['gradient_accumulation_steps']} x {at['per_device_batch_size']} x {at['sequence_length']} tokens a step"
        f"{of_each}"
    )


def _bar() -> str:
    """A block where the terminal can show one."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"
