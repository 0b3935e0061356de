"""YAML text to a tree in which every key and value knows the line it was written on.

PyYAML finds the structure; what a scalar means is decided in node.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from lowmem.errors import RecipeError
from lowmem.recipe.node import Node, number_from
from lowmem.recipe.problems import Place, Problems, shown

DEEPEST_NESTING = 30
MOST_NODES = 20_000
TAG = "tag:yaml.org,2002:"


def parse(text: str, source: str, problems: Problems) -> Node:
    """The tree of one YAML document; `source` is the file's name.

    Text that is no YAML at all raises RecipeError at once; duplicate keys and the like are added to
    `problems` and reading goes on.
    """
    node = _composed(text, lambda line: Place(source, line))
    if node is None:
        return Node(None, Place(source, 1))
    return _Builder(lambda line: Place(source, line), problems).node(node)


def parse_value(text: str, place: Place, problems: Problems) -> Node:
    """The value of one `a.b=text`; everything in it is said to be at `place`."""
    node = _composed(text, lambda line: place)
    return Node(None, place) if node is None else _Builder(lambda line: place, problems).node(node)


class _Loader(yaml.SafeLoader):
    """Composes nodes and refuses nesting so deep that it would exhaust Python's stack."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST_NESTING:
            mark = self.peek_event().start_mark
            reason = f"nested deeper than {DEEPEST_NESTING} levels"
            raise yaml.composer.ComposerError(None, None, reason, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _composed(text: str, at: Any) -> yaml.Node | None:
    line = 1
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        except (ValueError, OverflowError):  # from numbers inside escapes and directives, e.g. "\U99999999"
            line = loader.line + 1
            reason = "an escape or a directive holds a number that is out of range"
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        reason = f"the character {shown(chr(error.character))} is not allowed"
    except yaml.MarkedYAMLError as error:
        is_never_closed = "end" in (error.problem or "") and "stream" in (error.problem or "")
        mark = (is_never_closed and error.context_mark) or error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = _in_plain_words(error)
    raise RecipeError(f"{at(line)}: is not valid YAML: {reason}.")


def _in_plain_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "a tab. Indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a second ': ' in one line, or a line indented too far. Put text that holds ': ' in quotes"
    if "could not find expected ':'" in problem:
        return "a line that is neither `key: value` nor part of a list. Is a colon missing"
    if "expected <block end>" in problem:
        return "this line is indented differently from the lines it belongs to"
    if "found another document" in problem:
        return "a second document (---). A recipe is one document"
    if "found undefined alias" in problem:
        return shown(problem) + ". Put text that begins with * in quotes"
    if "scanning a quoted scalar" in (error.context or ""):
        return "a quote that is never closed"
    if "parsing a flow" in (error.context or ""):
        opened = f" opened on line {error.context_mark.line + 1}" if error.context_mark else ""
        return f"a [ or {{{opened} is never closed, or a comma is missing in it"
    context = f" {error.context}" if error.context else ""
    return shown(problem) + context


class _Builder:
    def __init__(self, at: Any, problems: Problems) -> None:
        self.at, self.problems, self.nodes = at, problems, 0
        self.open: set[int] = set()

    def node(self, node: yaml.Node) -> Node:
        place = self.at(node.start_mark.line + 1)
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise RecipeError(f"{place}: aliases (*) repeat each other more than {MOST_NODES:,} times.")
        if id(node) in self.open:
            raise RecipeError(f"{place}: an anchor (&) that holds an alias (*) of itself.")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node, place)
            if node.tag not in (TAG + "map", TAG + "seq"):
                self.refuse_tag(node, place)
            if isinstance(node, yaml.SequenceNode):
                return Node([self.node(item) for item in node.value], place)
            return self.mapping(node, place)
        finally:
            self.open.remove(id(node))

    def mapping(self, node: yaml.Node, place: Place) -> Node:
        pairs: dict[str, Node] = {}
        merged: list[Node] = []
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key_place = self.at(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                message = "a list or a section cannot be a key. Put text that begins with [ or { in quotes."
                self.problems.add(key_place, message)
                continue
            key = key_node.value
            value = replace(self.node(value_node), place=key_place)
            if key in first:
                where = "" if key_place.is_command_line else f", first on line {first[key]}"
                self.problems.add(key_place, f"{shown(key)} is given twice in one section{where}. Keep one.")
                continue
            first[key] = key_node.start_mark.line + 1
            if key_node.tag == TAG + "merge":
                merged = self.merge_sources(value)
            else:
                pairs[key] = value
        for source in merged:
            for key, value in source.value.items():
                pairs.setdefault(key, value)
        return Node(pairs, place)

    def merge_sources(self, value: Node) -> list[Node]:
        sources = value.value if isinstance(value.value, list) else [value]
        if all(isinstance(source.value, dict) for source in sources):
            return sources
        self.problems.add(value.place, "<< must name a section, as in <<: *base, or a list of sections.")
        return []

    def scalar(self, node: yaml.ScalarNode, place: Place) -> Node:
        text, kind = node.value, node.tag.removeprefix(TAG)
        value: Any = text
        if any("\ud800" <= char <= "\udfff" or char == "\0" for char in text):
            message = f"the text {shown(text)} holds a character that no file can hold. Delete it."
            self.problems.add(place, message)
        elif kind == "null":
            value = None
        elif kind == "bool":
            value = yaml.SafeLoader.bool_values.get(text.lower(), text)
        elif kind in ("int", "float"):
            value = number_from(text)
            value = text if value is None else value
        elif kind not in ("str", "timestamp", "value", "merge"):
            self.refuse_tag(node, place)
        return Node(value, place, text, is_plain=node.style is None)

    def refuse_tag(self, node: yaml.Node, place: Place) -> None:
        tag = node.tag.replace(TAG, "!!")
        self.problems.add(place, f"the YAML tag {shown(tag)} is not allowed in a recipe. Delete it.")
