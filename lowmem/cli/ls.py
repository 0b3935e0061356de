"""`lowmem ls`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_columns, print_json
from lowmem.errors import RecipeError
from lowmem.recipe.known_names import builtin_data_sets, chat_templates
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.shipped import shipped_recipes
from lowmem.recipe.suggest import did_you_mean

NO_RECIPES = """  none: this installation holds no recipes, and there is no folder recipes/ here. They are in the
  folder recipes/ of lowmem's source; lowmem show --schema prints every key a recipe may have."""
FORMATS = {
    "alpaca": "instruction, input (may be empty), output",
    "sharegpt": "conversations: [{from: human, value: ...}, {from: gpt, value: ...}]",
    "messages": "messages: [{role: user, content: ...}, {role: assistant, content: ...}]",
    "prompt_response": "prompt and response (or question and answer, prompt and completion)",
    "text": "text; a plain text file too",
}


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("ls", "List what there is to choose from, with one line about each.")
    parser.add_argument("kind", metavar="KIND", nargs="?", help=f"one of {', '.join(KINDS)}; all without")
    parser.add_json()
    options = parser.read(arguments)
    if options.kind is not None and options.kind not in KINDS:
        near = did_you_mean(options.kind, KINDS)
        raise RecipeError(f"lowmem ls: {options.kind} is no list.{near} Lists: {', '.join(KINDS)}.")
    chosen = KINDS if options.kind is None else {options.kind: KINDS[options.kind]}
    listed = {kind: entries() for kind, (_, entries) in chosen.items()}
    if options.json:
        print_json({kind: _as_objects(entries) for kind, entries in listed.items()})
        return 0
    for number, (kind, entries) in enumerate(listed.items()):
        print(f"{'' if number == 0 else chr(10)}{kind}: {KINDS[kind][0]}")
        print_columns(entries.items())
        if not entries:
            print(NO_RECIPES)
    return 0


def _as_objects(entries: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "summary": summary} for name, summary in entries.items()]


def _recipes() -> dict[str, str]:
    return {path.stem: _first_comment(path) for path in shipped_recipes()}


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _optimizers() -> dict[str, str]:
    return {name: entry["summary"] for name, entry in optimizer_table().items()}


def _templates() -> dict[str, str]:
    own = {"auto": "the tokenizer's own template, else plain"}
    return {**own, **chat_templates(), "FILE.jinja": "a template of your own"}


KINDS: dict[str, tuple[str, Callable[[], dict[str, str]]]] = {
    "recipes": ("lowmem show NAME prints one, lowmem cp NAME my.yaml makes it yours", _recipes),
    "optimizers": ("optimizer.name; lowmem show --schema prints their settings", _optimizers),
    "formats": ("data.train.format, the keys of a row", lambda: FORMATS),
    "templates": ("data.template, how a conversation becomes text", _templates),
    "builtins": ("data.train.builtin, generated data sets", lambda: dict(builtin_data_sets())),
}
