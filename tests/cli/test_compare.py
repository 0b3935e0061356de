"""`lowmem compare` as a command: what --with means, what is written, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli.compared_methods import names_and_settings, read_methods
from lowmem.recipe.load import load_recipe
from tests.cli.conftest import Command
from tests.test_layers import modules_after

CHECKOUT = Path(__file__).parents[2]
QUICKSTART = str(CHECKOUT / "recipes" / "quickstart.yaml")
SMALL = ("data.train.size=200", "data.eval.size=16", "train.per_device_batch_size=2")


def test_the_quickstart_is_compared_and_its_report_can_be_rebuilt(
    lowmem: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With processes of their own, as a user runs it."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = lowmem("compare", QUICKSTART, "--with", "galore,adamw_fused", "--steps", "8", "--json", *SMALL)
    assert done.code == 0, done.err
    assert "galore is the same as galore (recipe), and is measured once" in done.err
    out = folder / "runs" / "compare-quickstart"
    document = json.loads(done.out)
    assert document == json.loads((out / "comparison.json").read_text())
    ours, theirs = document["methods"]
    assert (ours["method"], ours["optimizer"]) == ("recipe", "galore")
    assert (theirs["method"], theirs["optimizer"]) == ("adamw_fused", "adamw_fused")
    assert ours["losses"][0] == theirs["losses"][0]
    assert len(ours["losses"]) == len(theirs["losses"]) == document["steps"] == 8
    assert ours["batch_checksums"] == theirs["batch_checksums"]
    # torch's AdamW keeps two tensors of each parameter in float32, and a step count of one block each
    assert 0 < theirs["optimizer_state_bytes"] - 8 * document["conditions"]["parameters"] < 100 * 1024
    assert ours["saved_bytes"] == theirs["peak_bytes"] - ours["peak_bytes"] > 0
    assert ours["versions"]["torch"] == document["conditions"]["torch"]
    again = folder / "again"
    again.mkdir()
    shutil.copy(out / "comparison.json", again)
    rebuilt = lowmem("report", "again")
    assert rebuilt.code == 0
    assert "adamw_fused" in rebuilt.out
    assert rebuilt.out.endswith("wrote again/comparison.md\n")
    for name in ("comparison.json", "comparison.md", "report.html", "plots/memory.png", "plots/loss.png"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_ctrl_c_keeps_what_was_measured(
    lowmem: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.hf.compared_run import main

    commands = []

    def run(command: list[str]) -> tuple[int, str]:
        commands.append(command)
        if len(commands) == 2:
            raise KeyboardInterrupt
        return main(command[3:]), ""

    monkeypatch.setattr("lowmem.hf.compare.run_to_the_end", run)
    done = lowmem("compare", QUICKSTART, "--with", "sgd,adamw", "--steps", "4", "--out", "out", *SMALL)
    assert done.code == 130
    assert "sgd was not measured: interrupted before it was measured" in done.out
    assert "interrupted; what was measured before is written" in done.err
    entries = json.loads((folder / "out" / "comparison.json").read_text())["methods"]
    assert [entry["peak_bytes"] is not None for entry in entries] == [True, False, False]


def test_ctrl_c_in_a_real_process_leaves_none_behind(folder: Path) -> None:
    command = [sys.executable, "-m", "lowmem.cli.main", "compare", QUICKSTART, "--with", "sgd", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "measuring galore (recipe) (1 of 2)" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted before anything was measured\n"
    assert not (folder / "runs" / "compare-quickstart" / "comparison.json").exists()


def test_names_and_their_settings_are_told_apart() -> None:
    text = "adamw, galore:lr=1e-3,betas=[0.9, 0.99],fallback={name: adamw, lr: 1e-4}, sgd_sai,"
    assert list(names_and_settings(text)) == [
        ("adamw", []),
        ("galore", ["lr=1e-3", "betas=[0.9, 0.99]", "fallback={name: adamw, lr: 1e-4}"]),
        ("sgd_sai", []),
    ]


def methods(*wanted: str, overrides: tuple[str, ...] = ()) -> dict[str, tuple[str | None, dict]]:
    """name -> (torch's variant, {name, target, fallback, settings}) for the recipe mine.yaml."""
    found = read_methods(load_recipe("mine.yaml", overrides), "mine.yaml", overrides, wanted, say=print)
    return {each.name: (each.torch_variant, vars(each.recipe.optimizer)) for each in found}


def test_another_optimizer_has_its_defaults_and_the_recipes_rate() -> None:
    found = methods("adamw,sgd_sai:lr=3e-5,momentum=0.8", overrides=("optimizer.target=[mlp]",))
    assert list(found) == ["recipe", "adamw", "sgd_sai:lr=3e-5,momentum=0.8"]
    own = {
        "name": "adamw",
        "target": ["mlp"],
        "clip": "applied",
        "refresh_from": "boundary",
        "fallback": None,
        "head": None,
        "groups": [],
        "beta2_half_life_tokens": None,
    }
    assert found["adamw"] == (None, {**own, "settings": {"lr": 1e-3}})
    assert found["sgd_sai:lr=3e-5,momentum=0.8"][1]["settings"] == {"lr": 3e-5, "momentum": 0.8}


def test_the_recipes_optimizer_keeps_its_settings_but_those_that_are_given() -> None:
    overrides = ("optimizer.fallback={name: sgd, lr: 2}", "optimizer.scale=0.5")
    found = methods("galore:rank=4,galore:fallback.lr=3,galore", overrides=overrides)
    assert list(found) == ["recipe", "galore:rank=4", "galore:fallback.lr=3"], "galore alone is the recipe"
    assert found["galore:rank=4"][1]["settings"] == {"lr": 1e-3, "rank": 4, "scale": 0.5}
    assert found["galore:rank=4"][1]["fallback"] == {"name": "sgd", "lr": 2}
    assert found["galore:fallback.lr=3"][1]["fallback"] == {"name": "sgd", "lr": 3}


def test_torchs_adamws_take_the_rate_and_the_decay() -> None:
    overrides = ("optimizer.weight_decay=0.3",)
    found = methods("adamw_fused", "adamw_foreach:lr=5,weight_decay=0", overrides=overrides)
    assert found["adamw_fused"][0] == "adamw_fused"
    assert found["adamw_fused"][1]["settings"] == {"lr": 1e-3, "weight_decay": 0.3}
    assert found["adamw_foreach:lr=5,weight_decay=0"][1]["settings"] == {"lr": 5, "weight_decay": 0}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("galor", "galor is no optimizer. Did you mean galore? Known: recipe, adamw,"),
        ("adamw_fusd", "Did you mean adamw_fused?"),
        ("galore:ranks=4", "optimizer.ranks is not a key. Did you mean optimizer.rank?"),
        ("sgd:rank=4", "optimizer.rank is a setting of galore, q_galore"),
        ("galore:rank=many", "optimizer.rank is many; it must be a whole number"),
        ("adamw:lr=-1", "optimizer.lr is -1; it must be a number >= 0"),
        ("adamw:lr", "is not of the form key=value"),
        ("adamw_fused:betas=[0.9, 0.9]", "betas is no setting of adamw_fused"),
        ("adamw:name=sgd", "Write sgd there"),
        ("lr=3", "lr=3 stands before any name. Write galore:lr=3."),
        ("adamw,{}", "{} is neither a name nor key=value"),
        (" , ", "--with names no optimizer"),
    ],
)
def test_a_wrong_with_is_answered_before_anything_heavy_is_done(
    lowmem: Command, folder: Path, wanted: str, said: str
) -> None:
    done = lowmem("compare", "mine.yaml", "--with", wanted)
    assert done.code == 2
    assert said in done.err
    assert all(line.startswith("lowmem compare: ") for line in done.err.splitlines())
    assert not (folder / "runs").exists()


def test_every_problem_of_with_is_named_at_once(lowmem: Command) -> None:
    done = lowmem("compare", "mine.yaml", "--with", "galor,sgd:rank=4,adamw")
    assert len(done.err.splitlines()) == 2


def test_its_help_leaves_torch_unimported() -> None:
    assert not modules_after("compare --help") & {"torch", "numpy", "transformers", "matplotlib"}


def test_with_is_required(lowmem: Command) -> None:
    done = lowmem("compare", "mine.yaml")
    assert done.code == 2
    assert "--with" in done.err


def test_a_folder_that_holds_something_else_is_left_alone(lowmem: Command, folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").touch()
    done = lowmem("compare", "mine.yaml", "--with", "sgd", "--out", "run")
    assert done.code == 2
    assert "run holds other files than a comparison's. Choose another folder with --out." in done.err
    done = lowmem("compare", "mine.yaml", "--with", "sgd", "--out", "mine.yaml")
    assert done.code == 2
    assert "mine.yaml cannot be written" in done.err


def test_a_launcher_and_too_few_steps_are_refused(lowmem: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowmem("compare", "mine.yaml", "--with", "sgd", "--steps", "2").code == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = lowmem("compare", "mine.yaml", "--with", "sgd")
    assert done.code == 4
    assert "Run lowmem compare without a launcher." in done.err


def test_when_every_method_fails_the_exit_code_says_so(
    lowmem: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.hf.compare.run_to_the_end", lambda command: (1, "odd\n"))
    done = lowmem("compare", "mine.yaml", "--with", "sgd", "--steps", "4", "data.train.size=50")
    assert done.code == 5
    assert "sgd was not measured: its process ended with code 1: odd" in done.out
    assert (folder / "runs" / "compare-mine" / "comparison.md").is_file()
