"""`lowmem export --optimizer`: a run goes on under another number of processes and another strategy."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.cli.main import main
from lowmem.hf.flow import train
from tests.hf.launches import OPTIMIZER, launched, with_deepspeed
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

SETTINGS = (
    OPTIMIZER,
    "train.max_grad_norm=0.5",
    "train.gradient_accumulation_steps=2",
    "train.lr_scheduler.name=constant",
    "save.optimizer_states=all",
    "report.log_every=1",
)
STRATEGIES = [
    "fsdp2",
    *(pytest.param(name, marks=[with_deepspeed, pytest.mark.slow]) for name in ("zero1", "zero3")),
]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


def trained_alone(tmp_path, model, steps: int, folder: str) -> None:
    settings = (*SETTINGS, f"train.max_steps={steps}", "train.per_device_batch_size=4", "save.every=2")
    assert train(tiny_recipe(tmp_path, model, *settings, f"save.dir={tmp_path / folder}")) == 0


def exported(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["export", "--optimizer", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_from_one_process_to_two_and_back(tmp_path, capsys, strategy):
    model = write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    trained_alone(tmp_path, model, 6, "whole")
    trained_alone(tmp_path, model, 2, "first")

    done = exported(capsys, tmp_path / "first", "--out", tmp_path / "second")
    assert (done["processes"], done["folder"]) == (1, str(tmp_path / "second"))
    divided = ("train.max_steps=4", "train.per_device_batch_size=2", "save.every=1")
    run = launched(strategy, str(recipe), *SETTINGS, *divided, f"save.dir={tmp_path / 'second'}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "continuing from step 2" in run.stdout

    assert exported(capsys, tmp_path / "second", "--out", tmp_path / "third")["processes"] == 2
    trained_alone(tmp_path, model, 6, "third")
    start = load_file(model / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "third"))
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3 * moved


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), (), "is not a run folder"),
        (lambda run: (run.parent / "there").mkdir(), ("--out", "there"), "exists and is not overwritten"),
        (lambda run: None, ("--dtype", "float16"), "--dtype is for a model"),
        (
            lambda run: [path.unlink() for path in run.rglob("*.pt*")],
            (),
            "checkpoint-2 is damaged: optimizer.pt is missing",
        ),
        (
            lambda run: (run / "checkpoint-2").rename(run / "old"),
            (),
            "has no checkpoint with optimizer state",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    tmp_path, capsys, monkeypatch, prepare, arguments, words
):
    model = write_model(tmp_path / "model")
    trained_alone(tmp_path, model, 2, "run")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "run")
    try:
        code = main(["export", "--optimizer", str(tmp_path / "run"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
