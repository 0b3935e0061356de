"""Whatever happens to a recipe's text, `lowmem validate` names file and line and never shows a traceback."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.cli.main import main
from tests.recipe.written import write

RECIPE = """\
# A recipe with most of the keys there are.
model: {name_or_path: builtin:tiny-llama, dtype: float32, attn: sdpa}
lora: {r: 4, alpha: 8, target: [q_proj, v_proj]}
data:
  train: &rows {builtin: arithmetic, size: 100}
  eval: {<<: *rows, split: held_out}
  template: plain
  max_length: 64
  packing: true
optimizer:
  name: galore
  lr: 1e-3
  betas: [0.9, 0.999]
  rank: 8
  target: [attn, mlp]
  fallback:
    name: adamw
    weight_decay: 0.1
eval: {every: 10, loss_only: false}
train:
  max_steps: 20
  per_device_batch_size: 8
  max_grad_norm: null
  lr_scheduler: {name: cosine, warmup_ratio: 0.1}
save: {dir: "runs/x", every: 10}
resume: never
report:
  baseline: none
"""
LINES = RECIPE.splitlines()
VALUES = [
    *("", "~", "null", "true", "yes", "0", "-1", "3", "1.5", "1e-4", "1e400", ".nan", ".inf", "010", "1:30"),
    *(
        "9" * 30,
        "9" * 5000,
        "-" + "9" * 400 + ".5",
        "0x" + "f" * 400,
        "text",
        '"3"',
        "'",
        '"\\ud800"',
        '"\\U99999999"',
    ),
    *(
        "[]",
        "[1, 2]",
        "[[[[]]]]",
        "{}",
        "{a: 1}",
        "{name: adamw}",
        "{<<: 3}",
        "*rows",
        "*none",
        "&rows 3",
        "!!int x",
    ),
    *(
        "!!python/name:os.system",
        "!!binary '='",
        "!!timestamp x",
        "2024-13-45",
        "<<",
        "=",
        "\u2603",
        "\U0001f600",
        "a: b",
    ),
    *(
        "[" * 200,
        "{a: " * 200,
        "- " * 100 + "x",
        "? x",
        "%YAML 9.9",
        "--- x",
        "| \n  x",
        "> x",
        "@",
        "`",
        "%",
    ),
]
KEYS = [
    "ranks",
    "lr",
    "Name",
    "settings",
    "<<",
    "",
    "1",
    "null",
    "true",
    "\u00fc",
    "x" * 300,
    "a.b",
    "[a]",
    "? b",
    "optimizer.lr",
]


def line(number: int, text: str) -> list[str]:
    return [*LINES[:number], text, *LINES[number + 1 :]]


def key_renamed(number: int, key: str) -> list[str]:
    return line(number, re.sub(r"[a-z_]+:", f"{key}:", LINES[number], count=1))


def value_replaced(number: int, value: str) -> list[str]:
    return line(number, LINES[number].partition(":")[0] + ": " + value)


def key_repeated(number: int, at: int) -> list[str]:
    return [*LINES[:at], LINES[number], *LINES[at:]]


def indented(number: int, blanks: str) -> list[str]:
    return line(number, blanks + LINES[number].lstrip())


def bytes_replaced(position: int, junk: bytes) -> bytes:
    content = RECIPE.encode()
    return content[:position] + junk + content[position + len(junk) :]


NUMBERS = st.integers(0, len(LINES) - 1)
MUTATED = st.one_of(
    st.builds(key_renamed, NUMBERS, st.sampled_from(KEYS)),
    st.builds(value_replaced, NUMBERS, st.sampled_from(VALUES)),
    st.builds(value_replaced, NUMBERS, st.text(max_size=20)),
    st.builds(key_repeated, NUMBERS, NUMBERS),
    st.builds(indented, NUMBERS, st.sampled_from(["", " ", "   ", "\t", "      ", "- "])),
    st.builds(lambda number: LINES[:number] + LINES[number + 1 :], NUMBERS),
    st.builds(lambda number: LINES[:number], NUMBERS),
    st.builds(bytes_replaced, st.integers(0, len(RECIPE)), st.binary(max_size=12)),
    st.builds(lambda junk: junk, st.binary(max_size=60)),
)


def as_bytes(mutated: list[str] | bytes) -> bytes:
    if isinstance(mutated, bytes):
        return mutated
    return "\n".join([*mutated, ""]).encode("utf-8", "surrogatepass")


def test_the_recipe_that_is_mutated_is_valid() -> None:
    write(RECIPE, "mutated.yaml")
    assert main(["validate", "mutated.yaml"]) == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MUTATED.map(as_bytes))
def test_a_mutated_recipe_is_valid_or_every_problem_names_file_and_line(
    capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    write(content, "mutated.yaml")
    code = main(["validate", "mutated.yaml"])
    printed = capsys.readouterr()
    if code == 0:
        assert printed.err == ""
        return
    assert code == 2
    assert printed.out == ""
    problems = printed.err.splitlines()
    assert problems
    for problem in problems:
        assert re.match(r"mutated\.yaml:\d+: \S", problem), problem
        assert 1 <= int(problem.split(":")[1]) <= content.count(b"\n") + content.count(b"\r") + 2
        assert problem.isprintable()
