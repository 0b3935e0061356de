"""train, eval, generate and report: what they hand to the layers below, and what they print."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowmem.errors import FaultError, RefusedError
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe
from tests.cli.conftest import Command


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module with the given functions in the place of a heavy one."""
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_train_runs_the_recipe_with_its_overrides(lowmem: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Recipe] = []

    def train(recipe: Recipe) -> int:
        trained.append(recipe)
        return 0

    stand_in(monkeypatch, "lowmem.hf.flow", train=train)
    assert lowmem("train", "shipped", "train.seed=5").code == 0
    assert trained == [load_recipe("shipped", ["train.seed=5"])]


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (130, 130, ""),
        (RefusedError("these two do not go together"), 4, "these two do not go together\n"),
        (FaultError("the disk is full"), 5, "the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_exit_code_says_how_a_run_ended(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch, outcome: Any, code: int, message: str
) -> None:
    def train(recipe: Recipe) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, int)
        return outcome

    stand_in(monkeypatch, "lowmem.hf.flow", train=train)
    done = lowmem("train", "mine.yaml")
    assert (done.code, done.err) == (code, message)


def test_a_wrong_recipe_stops_train_before_anything_heavy_is_imported(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "lowmem.hf.flow")  # has no train, so importing it would fail
    done = lowmem("train", "mine.yaml", "optimizer.ranks=3")
    assert done.code == 2
    assert "Did you mean optimizer.rank?" in done.err


def test_eval_prints_its_metrics_for_people_and_for_programs(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def evaluate(target: str, overrides: Sequence[str]) -> dict[str, Any]:
        asked.append((target, list(overrides)))
        return {"loss": 1.25, "perplexity": float("inf"), "tokens": 12345, "exact_match": None}

    stand_in(monkeypatch, "lowmem.hf.evaluation", evaluate=evaluate)
    done = lowmem("eval", "runs/x", "eval.max_batches=3")
    assert done.code == 0
    assert [line.split(maxsplit=1) for line in done.out.splitlines()][:3] == [
        ["loss", "1.2500"],
        ["perplexity", "inf"],
        ["tokens", "12,345"],
    ]
    printed = json.loads(lowmem("eval", "runs/x", "--json").out, parse_constant=pytest.fail)
    assert printed == {"loss": 1.25, "perplexity": "Infinity", "tokens": 12345, "exact_match": None}
    assert asked == [("runs/x", ["eval.max_batches=3"]), ("runs/x", [])]


class EchoingGenerator:
    """Answers with the words of the prompt, one piece a word."""

    asked: list[tuple[str, int, float]]

    def __init__(self, target: str, overrides: Sequence[str] = ()):
        self.target = target
        EchoingGenerator.asked = []

    def stream(self, prompt: str, *, max_new_tokens: int, temperature: float) -> Iterator[str]:
        EchoingGenerator.asked.append((prompt, max_new_tokens, temperature))
        yield from prompt.split()[:max_new_tokens]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "lowmem.hf.generation", Generator=EchoingGenerator)


@pytest.mark.usefixtures("echo")
def test_generate_answers_the_prompts_of_the_command_line(lowmem: Command) -> None:
    done = lowmem("generate", "runs/x", "--prompt", "a b c", "--prompt", "d", "--max-new-tokens", "2")
    assert (done.code, done.out) == (0, "ab\nd\n")
    assert EchoingGenerator.asked == [("a b c", 2, 0.0), ("d", 2, 0.0)]


@pytest.mark.usefixtures("echo")
def test_generate_answers_every_line_that_is_typed(lowmem: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n\n  \nthree\n"))
    done = lowmem("generate", "runs/x", "--json", "--temperature", "0.5")
    assert [json.loads(line) for line in done.out.splitlines()] == [
        {"prompt": "one two", "answer": "onetwo"},
        {"prompt": "three", "answer": "three"},
    ]
    assert EchoingGenerator.asked[0] == ("one two", 256, 0.5)


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize(
    "option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0", "--max-new-tokens=x"]
)
def test_generate_refuses_numbers_that_make_no_sense(lowmem: Command, option: str) -> None:
    done = lowmem("generate", "runs/x", "--prompt", "a", option)
    assert done.code == 2
    assert option.partition("=")[0] in done.err


def test_report_writes_every_run_and_prints_its_table(
    lowmem: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "lowmem.memory.report",
        write_report=lambda run: Path(run) / "report.md",
        table=lambda memory: f"table of {memory['peak_bytes']}",
    )
    stand_in(
        monkeypatch,
        "lowmem.memory.run_files",
        read_run=lambda run: SimpleNamespace(memory={"peak_bytes": 7} if run == "a" else None),
    )
    assert lowmem("report", "a", "b").out == "table of 7\nwrote a/report.md\nwrote b/report.md\n"
    assert json.loads(lowmem("report", "a", "--json").out) == [{"run": "a", "report": "a/report.md"}]


def test_report_of_something_that_is_no_run_is_refused(lowmem: Command, folder: Path) -> None:
    (folder / "empty").mkdir()
    for target in ("empty", "missing", "mine.yaml"):
        done = lowmem("report", target)
        assert done.code == 2
        assert target in done.err
