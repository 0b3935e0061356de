"""`lowmem compare`: several optimizers on the same steps of a recipe, measured side by side."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json
from lowmem.errors import RecipeError
from lowmem.memory.comparison import RECIPE, TORCH_ADAMWS, Method, table, write_comparison
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.problems import shown
from lowmem.recipe.schema import Recipe
from lowmem.recipe.shipped import find_recipe
from lowmem.recipe.suggest import did_you_mean

STEPS = 20
ALL_FAILED, INTERRUPTED = 5, 130
SETTINGS_OF_TORCH = ("lr", "weight_decay")
HEAD = re.compile(r"\s*([\w.-]+)\s*(=|:|$)")


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
    methods = read_methods(recipe, options.recipe, options.overrides, options.wanted)
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


def read_methods(recipe: Recipe, path: str, overrides: Sequence[str], wanted: Sequence[str]) -> list[Method]:
    """The recipe's own optimizer and those of --with; one that is named twice is measured once.

    Raises RecipeError with every problem of --with, settings checked as those of a recipe are.
    """
    methods, problems = [Method(RECIPE, recipe)], []
    try:
        named = [each for text in wanted for each in names_and_settings(text)]
    except RecipeError as error:
        raise RecipeError(f"lowmem compare: {error}") from error
    if not named:
        raise RecipeError(f"lowmem compare: --with names no optimizer. Known: {', '.join(_known())}.")
    for name, settings in named:
        label = name + (f":{','.join(settings)}" if settings else "")
        try:
            method = _method(label, name, settings, recipe, path, overrides)
        except RecipeError as error:
            problems += [f"lowmem compare: --with {shown(label)}: {problem}" for problem in error.problems]
            continue
        same = next((each for each in methods if _is_same(each, method)), None)
        if same is None:
            methods.append(method)
        elif name != RECIPE:
            _say(f"{label} is the same as {same.title}, and is measured once")
    if problems:
        raise RecipeError(problems)
    return methods


def names_and_settings(text: str) -> Iterator[tuple[str, list[str]]]:
    """("galore", ["lr=1e-3", "rank=64"]) and so on, of "galore:lr=1e-3,rank=64,adamw"."""
    name = ""
    settings: list[str] = []
    for piece in _pieces(text):
        head = HEAD.match(piece)
        if head is None:
            raise RecipeError(f"--with {shown(text)}: {shown(piece)} is neither a name nor key=value.")
        if head[2] != "=":
            if name:
                yield name, settings
            name, settings = head[1], []
            piece = piece[head.end() :]
        elif not name:
            raise RecipeError(
                f"--with {shown(text)}: {shown(piece)} stands before any name. Write galore:{shown(piece)}."
            )
        if piece.strip():
            settings.append(piece.strip())
    if name:
        yield name, settings


def _pieces(text: str) -> list[str]:
    """`text` divided at its commas, but not at those inside brackets; empty pieces are left out."""
    pieces, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return [piece for piece in pieces if piece.strip()]


def _known() -> list[str]:
    return [RECIPE, *optimizer_table(), *TORCH_ADAMWS]


def _method(
    label: str, name: str, settings: list[str], recipe: Recipe, path: str, overrides: Sequence[str]
) -> Method:
    """`settings` are laid over the recipe's where that has the same optimizer, else over the defaults."""
    own = recipe.optimizer
    if name not in _known():
        raise RecipeError(
            f"{shown(name)} is no optimizer.{did_you_mean(name, _known())} Known: {', '.join(_known())}."
        )
    section: dict[str, object] = {"name": name, "lr": own.settings["lr"], "target": own.target}
    if name in TORCH_ADAMWS:
        section = {"name": "adamw", "lr": own.settings["lr"]}
        section["weight_decay"] = own.settings.get("weight_decay", 0.0)  # as in the report of a run
        for setting in settings:
            if (key := setting.partition("=")[0].strip()) not in SETTINGS_OF_TORCH:
                raise RecipeError(
                    f"{shown(key)} is no setting of {name}. It is torch's own and takes "
                    f"{' and '.join(SETTINGS_OF_TORCH)}."
                )
    replaced = [] if name in (RECIPE, own.name) else [f"optimizer={json.dumps(section)}"]
    changed = [f"optimizer.{setting}" for setting in settings]
    if any(setting.startswith("name=") for setting in settings):
        raise RecipeError(f"the name stands before the colon. Write {settings[0].partition('=')[2]} there.")
    return Method(
        label,
        load_recipe(path, [*overrides, *replaced, *changed]),
        torch_variant=name if name in TORCH_ADAMWS else None,
    )


def _is_same(one: Method, other: Method) -> bool:
    return one.recipe.optimizer == other.recipe.optimizer and one.torch_variant == other.torch_variant


def writable_folder(folder: Path) -> Path:
    """`folder`, made if need be. Raises RecipeError where it cannot be written or holds a run."""
    for name in ("memory.json", "metrics.jsonl", "recipe.yaml"):
        if (folder / name).exists():
            raise RecipeError(f"lowmem compare: {folder} holds a run. Choose another folder with --out.")
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
