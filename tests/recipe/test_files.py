"""Files that are no recipe at all: one clear line each, with file and line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.errors import RecipeError
from lowmem.recipe.load import load_recipe
from tests.recipe.written import SMALL, problems_of, with_lines, write

MALFORMED = {
    "tab": ("model:\n\tname_or_path: x\n", "r.yaml:2: is not valid YAML: a tab. Indent with spaces"),
    "second colon": ("a: b\nmodel: x: y\n", "r.yaml:2: is not valid YAML: a second ': ' in one line"),
    "open bracket": (
        "model: {name_or_path: x\ndata:\n",
        "r.yaml:2: is not valid YAML: a [ or { opened on line 1 is never closed",
    ),
    "open quote": (
        'model:\n  name_or_path: "x\n',
        "r.yaml:2: is not valid YAML: a quote that is never closed",
    ),
    "indentation": (
        "model:\n  name_or_path: x\n dtype: y\n",
        "r.yaml:3: is not valid YAML: this line is indented",
    ),
    "unknown alias": ("a: 1\nmodel: *m\n", "r.yaml:2: is not valid YAML: found undefined alias"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml:2: is not valid YAML: a second document"),
    "bad escape": ('a: 1\nb: "\\U99999999"\n', "r.yaml:2: is not valid YAML: an escape"),
    "control character": ("a: 1\nb: \x07\n", "r.yaml:2: is not valid YAML: the character \\x07"),
    "deep": ("a: 1\nb: " + "[" * 5000 + "\n", "r.yaml:2: is not valid YAML: nested deeper than"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_yaml_gives_one_problem_with_its_line(name: str) -> None:
    text, expected = MALFORMED[name]
    (problem,) = problems_of(text)
    assert problem.startswith(expected)
    assert problem.endswith(".")


def test_an_anchor_that_holds_itself_is_refused() -> None:
    (problem,) = problems_of("model: 1\ndata: &a [*a]\n")
    assert problem.startswith("r.yaml:2: ")


def test_aliases_that_multiply_without_end_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (problem,) = problems_of("\n".join(lines))
    assert "aliases" in problem


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~\n"])
def test_an_empty_file_is_told_what_a_recipe_has(text: str) -> None:
    (problem,) = problems_of(text)
    assert problem.startswith("r.yaml:1: is empty. A recipe has the keys model, lora, data, optimizer")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_file_without_keys_is_told_what_a_recipe_has(text: str) -> None:
    (problem,) = problems_of(text)
    assert problem.startswith("r.yaml:1: holds a list or a single value, not keys.")


def test_a_binary_file_is_named_as_one() -> None:
    (problem,) = problems_of(b"PK\x03\x04\n\x00\x00")
    assert problem.startswith("r.yaml:2: holds a zero byte, so this is a binary file")


def test_text_that_is_not_utf_8_is_named_with_line_and_byte() -> None:
    (problem,) = problems_of("model: x\n# gr\xfcn\n".encode("latin-1"))
    assert problem.startswith("r.yaml:2: byte 0xfc is not UTF-8 text.")


def test_a_data_file_taken_for_a_recipe_is_not_parsed() -> None:
    (problem,) = problems_of('{"prompt": "a"}\n' * 100_000)
    assert "too long for a recipe" in problem


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(encoding: str, newline: str) -> None:
    text = SMALL.replace("\n", newline)
    assert load_recipe(write(text.encode(encoding))).optimizer.name == "galore"
    (problem,) = problems_of((text + "foo: 1" + newline).encode(encoding))
    assert problem.startswith("r.yaml:7: ")


def test_a_missing_file_names_the_recipe_that_was_probably_meant() -> None:
    write(SMALL, "my_recipe.yaml")
    with pytest.raises(
        RecipeError, match=r"^my_recpe.yaml: there is no such file. Did you mean my_recipe.yaml\?$"
    ):
        load_recipe("my_recpe.yaml")


def test_a_missing_file_lists_recipes_near_by_when_none_is_alike() -> None:
    write(SMALL, "one.yaml")
    with pytest.raises(
        RecipeError, match=r"^zzzzzzzz.yaml: there is no such file. Recipes near-by: one.yaml"
    ):
        load_recipe("zzzzzzzz.yaml")


def test_a_folder_is_no_recipe_and_the_recipes_in_it_are_listed() -> None:
    Path("mine").mkdir()
    write(SMALL, "mine/a.yaml")
    with pytest.raises(RecipeError, match=r"^mine: is a folder, not a recipe. Recipes near-by: mine/a.yaml"):
        load_recipe("mine")


def test_a_bare_name_finds_a_recipe_of_the_recipes_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.__file__", "/nowhere/lowmem/__init__.py")
    Path("recipes").mkdir()
    write(SMALL, "recipes/tiny.yaml")
    assert load_recipe("tiny").save.dir == "runs/tiny"
    with pytest.raises(RecipeError, match="Did you mean tiny"):
        load_recipe("tiyn")


def test_duplicate_keys_are_reported_with_both_lines_and_reading_goes_on() -> None:
    problems = problems_of(with_lines("  rank: 3\n  rank: 4\ntrain: {seed: 1}\ntrain: {sed: 1}\n"))
    assert problems == [
        "r.yaml:8: rank is given twice in one section, first on line 7. Keep one.",
        "r.yaml:10: train is given twice in one section, first on line 9. Keep one.",
    ]


def test_anchors_and_merge_keys_work_and_own_keys_win() -> None:
    text = SMALL.replace(
        "  train: {builtin: arithmetic}\n",
        "  train: &rows {builtin: arithmetic, size: 10}\n  eval: {<<: *rows, split: held_out, size: 5}\n",
    )
    recipe = load_recipe(write(text))
    assert recipe.data.eval is not None
    assert (recipe.data.eval.builtin, recipe.data.eval.split, recipe.data.eval.size) == (
        "arithmetic",
        "held_out",
        5,
    )
    assert recipe.data.train.size == 10


@pytest.mark.parametrize("merge", ["<<: 3", "<<: [a, b]"])
def test_a_merge_key_that_names_no_section_is_reported(merge: str) -> None:
    (problem,) = problems_of(with_lines(f"train:\n  {merge}\n"))
    assert problem.startswith("r.yaml:8: << must name a section")


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system [ls]", "!!binary aGk=", "!mine 3", "!!set {a}"]
)
def test_yaml_tags_are_refused_and_never_run(value: str) -> None:
    problems = problems_of(with_lines(f"resume: {value}\n"))
    assert problems[0].startswith("r.yaml:7: the YAML tag ")


def test_a_list_as_a_key_is_reported() -> None:
    (problem,) = problems_of(with_lines("? [a]\n: b\n"))
    assert problem.startswith("r.yaml:7: a list or a section cannot be a key.")


def test_loading_a_recipe_imports_neither_torch_nor_numpy_nor_transformers() -> None:
    path = write(SMALL)
    code = (
        "import sys; from lowmem.recipe.load import load_recipe; from lowmem.recipe.dump import dump_recipe\n"
        f"dump_recipe(load_recipe({str(path)!r}))\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
