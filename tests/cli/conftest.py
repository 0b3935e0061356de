from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowmem.cli.main import main

RECIPE = """\
# A tiny model learns sums.
model: {name_or_path: builtin:tiny-llama}
data: {train: {builtin: arithmetic}}
optimizer: {name: galore, lr: 1.0e-3, rank: 8}
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def lowmem(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs one command line in this process."""

    def run(*arguments: str) -> Outcome:
        code = main(list(arguments))
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe of one's own, and recipes/ with the one that is shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem.__file__", str(tmp_path / "site-packages" / "lowmem" / "__init__.py"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "shipped.yaml").write_text(RECIPE)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path
