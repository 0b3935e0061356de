"""Damaged int8 files, through each verb that reads them: named, without a traceback, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem.cli.main import main
from tests.hf.tiny_runs import write_model, write_recipe

UP = "model.layers.1.mlp.up_proj"
CODES, SCALES = f"{UP}.weight_codes", f"{UP}.weight_scales"
WEIGHTS = "model.safetensors"
INT8 = (
    "model.weights=int8",
    "model.int8.group_size=16",
    "save.int8=true",
    "report.baseline=none",
    "report.plan=false",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run in int8."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, write_model(folder))
    assert main(["train", str(recipe), *INT8, "save.every=3", f"save.dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(bytes(content))


DAMAGES = {
    "cut": (cut, WEIGHTS),
    "header": (lambda file: file.write_bytes(b"\xff" * 200), WEIGHTS),
    "empty": (lambda file: file.write_bytes(b""), WEIGHTS),
    "no scales": (edited(lambda tensors: tensors.pop(SCALES)), SCALES),
    "no codes": (edited(lambda tensors: tensors.pop(CODES)), CODES),
    "float codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].float()})), CODES),
    "turned codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].T.contiguous()})), UP),
    "turned scales": (
        edited(lambda tensors: tensors.update({SCALES: tensors[SCALES].T.contiguous()})),
        SCALES,
    ),
    "scales not finite": (edited(lambda tensors: tensors[SCALES].fill_(torch.nan)), SCALES),
}


def said_by(verb: str, run: Path, model: Path, trained: Path, capsys) -> str:
    arguments = {
        "generate": ["generate", str(run), "--prompt", "12+3="],
        "eval": ["eval", str(run)],
        "export a run": ["export", str(run)],
        "export a folder": ["export", str(model)],
        "train in int8": ["train", str(trained / "sums.yaml"), "model.weights=int8"],
        "train in float": ["train", str(trained / "sums.yaml")],
    }[verb]
    if verb.startswith("train"):
        arguments += [f"model.name_or_path={model}", f"save.dir={run.parent / 'next'}"]
    before = {path.name for path in run.parent.iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if verb.startswith("export"):
        assert {path.name for path in run.parent.iterdir()} == before
    return said


VERBS = ["generate", "eval", "export a run", "export a folder", "train in int8", "train in float"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_named_by_file_or_tensor(run, trained, name, verb, capsys):
    damage, named = DAMAGES[name]
    damage(run / "model" / WEIGHTS)
    assert named in said_by(verb, run, run / "model", trained, capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_a_flipped_bit_in_a_checkpoint_is_found(run, trained, verb, capsys):
    shutil.rmtree(run / "model")
    flip_a_bit(run / "checkpoint-6" / WEIGHTS)
    said = said_by(verb, run, run / "checkpoint-6", trained, capsys)
    assert WEIGHTS in said
    assert "damaged" in said
