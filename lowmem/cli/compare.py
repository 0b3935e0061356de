"""`lowmem compare`: several optimizers on the same steps of a recipe, measured side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.compared_methods import read_methods
from lowmem.cli.output import print_json
from lowmem.errors import RecipeError
from lowmem.memory.comparison import TORCH_ADAMWS, is_comparison, table, write_comparison
from lowmem.recipe.load import load_recipe
from lowmem.recipe.shipped import find_recipe

STEPS = 20
ALL_FAILED, INTERRUPTED = 5, 130


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "compare",
        "Measure several optimizers on the same first steps of a recipe, each in a fresh process: memory, seconds, "
        "losses. The recipe's own optimizer is always the first of them.",
    )
    parser.add_recipe()
    parser.add_overrides()
    parser.add_argument(
        "--with",
        dest="wanted",
        metavar="NAMES",
        action="append",
        required=True,
        help="adamw,galore:rank=64,lr=1e-3,sgd_sai: optimizers, each with settings of its own after a colon; "
        f"also {', '.join(TORCH_ADAMWS)}, which are torch's",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=STEPS, help=f"optimizer steps of each ({STEPS})"
    )
    parser.add_argument("--out", metavar="DIR", help="output folder (runs/compare-<recipe name>)")
    parser.add_json()
    options = parser.read(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    methods = read_methods(recipe, options.recipe, options.overrides, options.wanted, say=_say)
    name = (find_recipe(options.recipe) or Path(options.recipe)).stem
    folder = writable_folder(Path(options.out or f"runs/compare-{name}").expanduser())
    from lowmem.hf.compare import compare

    compared = compare(name, methods, steps=options.steps, say=_say)
    if compared.document is None:
        _say("interrupted before anything was measured")
        return INTERRUPTED
    written = write_comparison(compared.document, folder)
    if options.json:
        print_json(compared.document)
    else:
        print(table(compared.document))
        print(f"\nreport: {written}")
    if compared.was_interrupted:
        _say("interrupted; what was measured before is written")
        return INTERRUPTED
    has_failed = all(entry["reason"] is not None for entry in compared.document["methods"])
    return ALL_FAILED if has_failed else 0


def writable_folder(folder: Path) -> Path:
    """`folder`, made if need be. Raises RecipeError where it cannot be written or holds something else."""
    if folder.is_dir() and any(folder.iterdir()) and not is_comparison(folder):
        raise RecipeError(
            f"lowmem compare: {folder} holds other files than a comparison's. Choose another folder with --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise RecipeError(f"lowmem compare: {folder} cannot be written: {error.strerror}.") from error
    return folder


def _say(text: str) -> None:
    """On standard error: what is printed on standard output is the result."""
    print(text, file=sys.stderr, flush=True)
