"""`lowmem export --optimizer`: a run goes on under another number of processes and another strategy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.cli.main import main
from lowmem.hf.adapter_files import adapters_in, write_adapters_
from lowmem.hf.flow import train
from lowmem.run.checkpoint import seal
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
LORA = ("lora={r: 4, alpha: 8}",)
INT8 = ("model.weights=int8", "model.int8.group_size=16", "model.int8.embeddings=true", "save.int8=true")
KINDS = {"adapters": LORA, "int8 weights": INT8}
ZERO = [with_deepspeed, pytest.mark.slow]
LAUNCHES = [
    pytest.param("fsdp2", (), id="fsdp2"),
    pytest.param("zero1", (), id="zero1", marks=ZERO),
    pytest.param("zero3", (), id="zero3", marks=ZERO),
    pytest.param("ddp", LORA, id="ddp with LoRA", marks=pytest.mark.slow),
    pytest.param("ddp", INT8, id="ddp with int8 weights", marks=pytest.mark.slow),
    pytest.param("fsdp2", LORA, id="fsdp2 with LoRA", marks=pytest.mark.slow),
    pytest.param("zero3", LORA, id="zero3 with LoRA", marks=ZERO),
]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


def trained_alone(tmp_path, model, steps: int, folder: str, *more: str) -> None:
    settings = (*SETTINGS, f"train.max_steps={steps}", "train.per_device_batch_size=4", "save.every=2", *more)
    assert train(tiny_recipe(tmp_path, model, *settings, f"save.dir={tmp_path / folder}")) == 0


def exported(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["export", "--optimizer", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def weights_in(folder) -> dict:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("strategy", "more"), LAUNCHES)
def test_a_run_goes_from_one_process_to_two_and_back(tmp_path, capsys, strategy, more):
    model = write_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    trained_alone(tmp_path, model, 6, "whole", *more)
    trained_alone(tmp_path, model, 2, "first", *more)
    start = weights_in(tmp_path / "first" / "checkpoint-2")

    done = exported(capsys, tmp_path / "first", "--out", tmp_path / "second")
    assert (done["processes"], done["folder"]) == (1, str(tmp_path / "second"))
    divided = ("train.max_steps=4", "train.per_device_batch_size=2", "save.every=1")
    run = launched(strategy, str(recipe), *SETTINGS, *divided, *more, f"save.dir={tmp_path / 'second'}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "continuing from step 2" in run.stdout

    processes = 1 if strategy == "ddp" else 2  # each has all of it there, and one saves it
    assert exported(capsys, tmp_path / "second", "--out", tmp_path / "third")["processes"] == processes
    trained_alone(tmp_path, model, 6, "third", *more)
    one, two = (weights_in(tmp_path / name / "model") for name in ("whole", "third"))
    codes = [name for name, value in one.items() if value.dtype == torch.int8]
    assert bool(codes) == (more == INT8)
    moved = sum((one[name] != start[name]).sum().item() for name in codes)
    assert sum((one[name] != two[name]).sum().item() for name in codes) <= 0.01 * moved
    values = one.keys() - codes
    moved = max((one[name] - start[name]).abs().max().item() for name in values)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in values) < 1e-3 * moved


@pytest.mark.parametrize("more", KINDS.values(), ids=KINDS)
def test_an_exported_run_goes_on_with_the_bits_of_one_that_never_stopped(tmp_path, capsys, more):
    model = write_model(tmp_path / "model")
    trained_alone(tmp_path, model, 4, "whole", *more)
    trained_alone(tmp_path, model, 2, "first", *more)
    saved = torch.load(tmp_path / "first" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    done = exported(capsys, tmp_path / "first", "--out", tmp_path / "second")
    assert done["parameters"] == len(saved["state"]) > 20
    trained_alone(tmp_path, model, 4, "second", *more)
    one, two = (weights_in(tmp_path / name / "checkpoint-4") for name in ("whole", "second"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_finest_adapters_that_any_process_had_are_those_of_an_exported_run(tmp_path, capsys):
    """DeepSpeed computes with bfloat16 ones beside a bfloat16 model, and keeps float32 ones for its steps."""
    model = write_model(tmp_path / "model")
    trained_alone(tmp_path, model, 2, "run", *LORA)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    finest = adapters_in(checkpoint)
    write_adapters_(checkpoint, {name: value.bfloat16() for name, value in finest.items()})
    ranges = {name: [[0, value.numel()]] for name, value in finest.items()}
    saved = {
        "places": {"rank": 0, "processes": 1, "ranges": ranges, "by_rows": []},
        "state": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "weights": {name: value.view(-1) for name, value in finest.items()},
    }
    torch.save(saved, checkpoint / "optimizer-0-of-1.pt")
    (checkpoint / "optimizer.pt").unlink()
    seal(checkpoint, step=2)

    exported(capsys, tmp_path / "run", "--out", tmp_path / "out")
    found = adapters_in(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(found[name], value) for name, value in finest.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in finest.values())


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
