"""The installed command as a process: exit codes, standard error, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE

CHECKOUT = Path(__file__).parents[2]


def lowmem(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowmem.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["validate", "mine.yaml"], 0),
        (["validate", "mine.yaml", "optimizer.ranks=3"], 2),
        (["validate", "missing.yaml"], 2),
        (["train", "mine.yaml", "nonsense"], 2),
        (["trian"], 2),
        (["eval"], 2),
    ],
)
def test_the_exit_code_and_never_a_traceback(arguments: list[str], code: int) -> None:
    done = lowmem(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == (code != 0)


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m lowmem.cli.main show --schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[1] in ("0", "141")


def test_a_terminal_without_unicode_shows_escapes_instead_of_a_traceback(folder: Path) -> None:
    (folder / "mine.yaml").write_text(RECIPE + 'save: {dir: "\u2603", every: "\u2603"}\n', encoding="utf-8")
    done = lowmem("validate", "mine.yaml", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith('mine.yaml:5: save.every is "\\u2603"; ')
    assert lowmem("show", "mine.yaml", PYTHONIOENCODING="ascii").returncode == 0
