"""Names that a recipe may use and that other parts of lowmem define, looked up without torch."""

from __future__ import annotations

from collections.abc import Mapping


def builtin_data_sets() -> Mapping[str, str]:
    """Generated data sets: name -> what is in them."""
    from lowmem.data.builtins import BUILTINS

    return BUILTINS


def chat_templates() -> Mapping[str, str]:
    """Named templates: name -> what they look like."""
    from lowmem.data.templates import SUMMARIES

    return SUMMARIES
