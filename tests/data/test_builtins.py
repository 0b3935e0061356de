from __future__ import annotations

import re
import string
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.data.builtins import BUILTINS, generate, is_held_out
from lowmem.data.prepare import prepare
from lowmem.errors import RecipeError
from lowmem.hf.builtin_model import character_tokenizer
from lowmem.recipe.schema import DataRecipe, SourceRecipe

NAMES = sorted(BUILTINS)
Row = dict[str, str]


def rows(name: str, split: str = "train", size: int | None = 400, seed: int = 0) -> list[Row]:
    return generate(name, split=split, size=size, seed=seed)  # type: ignore[arg-type]


def what_is_asked_about(name: str, prompt: str) -> Any:
    """The problem behind a prompt, read back from its text: wording and order do not matter."""
    if name == "arithmetic":
        return tuple(sorted(int(number) for number in re.findall(r"\d+", prompt)))
    if name == "sorting":
        return frozenset(re.fullmatch(r"Sort ((?:[a-z] )+)from . to .\.", prompt)[1].split())  # type: ignore[index]
    return prompt.split()[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_problem_is_in_any_training_set_of_any_seed(name: str) -> None:
    trained = {
        what_is_asked_about(name, row["prompt"])
        for seed in range(3)
        for row in rows(name, size=3000, seed=seed)
    }
    held_out = {
        what_is_asked_about(name, row["prompt"])
        for seed in range(3)
        for row in rows(name, "held_out", size=500, seed=seed)
    }
    assert len(held_out) > 1000
    assert not trained & held_out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_problem_comes_twice_in_one_data_set(name: str, split: str) -> None:
    asked = [what_is_asked_about(name, row["prompt"]) for row in rows(name, split, size=2000)]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", NAMES)
def test_seed_split_and_name_decide_the_rows_and_nothing_else_does(name: str) -> None:
    assert rows(name) == rows(name)
    assert rows(name) != rows(name, seed=1)
    assert {row["prompt"] for row in rows(name)}.isdisjoint(row["prompt"] for row in rows(name, "held_out"))


def test_the_rows_are_the_same_in_every_process_and_every_version() -> None:
    """Written down once; a change of this data changes what every published number was measured on."""
    program = (
        "from lowmem.data.builtins import generate\n"
        "for name in ('arithmetic', 'sorting', 'rewriting'):\n"
        "    print(*generate(name, split='held_out', size=2, seed=7), sep='\\n')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "123"},
    ).stdout.splitlines()
    assert found == [
        "{'prompt': '915 plus 503 is?', 'response': '5+3=8, 1+0=1, 9+5=14, so 1418.'}",
        "{'prompt': 'What is 230 + 442?', 'response': '0+2=2, 3+4=7, 2+4=6, so 672.'}",
        "{'prompt': 'Sort t c m p x from z to a.', 'response': 'x t p m c'}",
        "{'prompt': 'Sort d v h r g from z to a.', 'response': 'v r h g d'}",
        "{'prompt': 'Write duyareno in capitals.', 'response': 'DUYARENO'}",
        "{'prompt': 'Write weqerupa with every letter twice.', 'response': 'wweeqqeerruuppaa'}",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_small_data_set_is_the_beginning_of_a_large_one(name: str) -> None:
    assert rows(name, size=300) == rows(name, size=1000)[:300]


@pytest.mark.parametrize("name", NAMES)
def test_about_a_tenth_of_all_problems_is_held_out(name: str) -> None:
    part = sum(is_held_out(name, f"{number}+{number + 1}") for number in range(10_000)) / 10_000
    assert 0.085 < part < 0.115


def test_without_a_size_there_are_enough_rows_to_learn_from_and_to_judge_by() -> None:
    assert len(rows("arithmetic", size=None)) == 10_000
    assert len(rows("arithmetic", "held_out", size=None)) == 200


def test_every_column_and_every_sum_of_the_working_is_right() -> None:
    for row in rows("arithmetic", size=3000):
        a, b = (int(number) for number in re.findall(r"\d+", row["prompt"]))
        working, answer = re.fullmatch(r"(.*), so (\d+)\.", row["response"]).groups()  # type: ignore[union-attr]
        assert int(answer) == a + b, row
        carry = 0
        for power, column in enumerate(working.split(", ")):
            summands, total = column.split("=")
            numbers = [int(number) for number in summands.split("+")]
            assert numbers[:2] == [a // 10**power % 10, b // 10**power % 10], row
            assert numbers[2:] == ([1] if carry else []), row
            assert int(total) == sum(numbers), row
            carry = int(total) // 10
        assert power + 1 == max(len(str(a)), len(str(b))), row


def test_the_numbers_have_two_or_three_digits_in_every_combination() -> None:
    lengths = {
        tuple(len(number) for number in re.findall(r"\d+", row["prompt"])) for row in rows("arithmetic")
    }
    assert lengths == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_sorted_letters_are_the_letters_asked_for_in_the_order_asked_for() -> None:
    directions = set()
    for row in rows("sorting", size=2000):
        letters = sorted(what_is_asked_about("sorting", row["prompt"]))
        direction = row["prompt"].rpartition(" from ")[2]
        directions.add(direction)
        expected = letters if direction == "a to z." else letters[::-1]
        assert row["response"].split() == expected, row
        assert 5 <= len(letters) <= 7, row
    assert directions == {"a to z.", "z to a."}


def test_rewritten_words_are_what_the_instruction_says() -> None:
    instructions = set()
    for row in rows("rewriting", size=2000):
        _, word, instruction = row["prompt"].rstrip(".").split(" ", 2)
        instructions.add(instruction)
        answer = row["response"]
        if instruction == "backwards":
            assert "".join(reversed(answer)) == word, row
        elif instruction == "in capitals":
            assert answer.isupper(), row
            assert answer.lower() == word, row
        elif instruction == "without vowels":
            assert answer == re.sub("[aeiou]", "", word), row
        else:
            assert answer[::2] == answer[1::2] == word, row
    assert instructions == {"backwards", "in capitals", "without vowels", "with every letter twice"}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_responses_are_one_line_of_plain_characters(name: str) -> None:
    allowed = set(string.ascii_letters + string.digits + " +=,.?")
    for row in rows(name):
        assert set(row) == {"prompt", "response"}
        for text in row.values():
            assert text == text.strip()
            assert text
            assert set(text) <= allowed


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(NAMES), size=st.integers(1, 50), seed=st.integers(0, 2**63))
def test_any_size_and_seed_give_that_many_rows(name: str, size: int, seed: int) -> None:
    assert len(rows(name, size=size, seed=seed)) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_sizes_can_be_had(name: str) -> None:
    assert len(rows(name, size=100_000)) == 100_000
    assert len(rows(name, "held_out", size=10_000)) == 10_000


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known() -> None:
    with pytest.raises(
        RecipeError, match=r"aritmetic is not a generated data set\. Did you mean arithmetic\?"
    ) as error:
        rows("aritmetic")
    assert all(name in str(error.value) for name in NAMES)


def test_an_unknown_split_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"heldout is not a split of a builtin\. Did you mean held_out\?"):
        rows("arithmetic", "heldout")


@pytest.mark.parametrize(("split", "size"), [("train", 100_001), ("held_out", 10_001), ("train", 0)])
def test_a_size_beyond_what_there_is_names_the_range(split: str, size: int) -> None:
    with pytest.raises(RecipeError, match=rf"size: {size} rows of arithmetic .* 1 to (100,000|10,000)"):
        rows("arithmetic", split, size=size)


def test_names_and_rows_are_there_without_torch_numpy_and_transformers() -> None:
    program = (
        "import sys\n"
        "from lowmem.data.builtins import BUILTINS, generate\n"
        "generate('arithmetic', split='train', size=5, seed=0)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'transformers'}))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_on_the_whole_answer_and_asks_for_it(name: str) -> None:
    source = SourceRecipe(builtin=name, split="held_out", size=3)
    tokenizer = character_tokenizer()
    prepared = prepare(source, DataRecipe(train=source), tokenizer, seed=5, where="data.eval")
    expected = rows(name, "held_out", size=3, seed=5)
    assert [question.answer for question in prepared.questions] == [row["response"] for row in expected]
    for example, row in zip(prepared.examples, expected, strict=True):
        trained = [label for label in example.labels if label != -100]
        assert tokenizer.decode(trained) == row["response"] + "</s>"
        assert tokenizer.decode(example.input_ids) == f"{row['prompt']}\n{row['response']}</s>"
