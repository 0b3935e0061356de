"""A recipe back to YAML, every key written out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from lowmem.recipe.schema import Recipe


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data in the layout of a recipe file.

    The optimizer's settings stand directly under `optimizer`, as they were written; of a data source only
    the keys that are used appear.
    """
    document = asdict(recipe)
    chosen = document["optimizer"]
    settings = chosen.pop("settings")
    document["optimizer"] = {"name": chosen.pop("name"), **settings, **chosen}
    for name, source in document["data"].items():
        if isinstance(source, dict):
            document["data"][name] = {key: value for key, value in source.items() if value is not None}
    return document


def dump_recipe(recipe: Recipe) -> str:
    """YAML text; reading it with `load_recipe` gives an equal recipe."""
    return yaml.dump(
        recipe_document(recipe),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=None,
    )


class _Dumper(yaml.SafeDumper):
    """Writes out a value that appears twice, instead of an anchor and an alias, and pairs as lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In any other style PyYAML writes these line ends as they are, and reads them back as blanks.
    style = '"' if any(char in text for char in "\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(tuple, lambda dumper, pair: dumper.represent_list(list(pair)))
