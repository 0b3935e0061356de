"""Damaged int8 files, through each verb that reads them: named, without a traceback, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem.cli.main import main
from tests.hf.tiny_runs import write_model, write_recipe

DOWN = "model.layers.1.mlp.down_proj"  # (16, 24), in two groups a row
CODES, SCALES = f"{DOWN}.weight_codes", f"{DOWN}.weight_scales"
WEIGHTS = "model.safetensors"
INT8 = (
    "model.weights=int8",
    "model.int8.group_size=16",
    "save.int8=true",
    "report.baseline=none",
    "report.plan=false",
    "save.every=3",
    "save.optimizer_states=all",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run in int8."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, write_model(folder))
    assert main(["train", str(recipe), *INT8, f"save.dir={folder / 'run'}"]) == 0
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


def swap_shapes(tensors: dict[str, Tensor]) -> None:
    """Codes and scales that go together, but not with the model."""
    tensors[CODES] = tensors[CODES].T.contiguous()
    tensors[SCALES] = torch.ones(24, 1)


DAMAGES = {
    "cut": (cut, WEIGHTS),
    "header": (lambda file: file.write_bytes(b"\xff" * 200), WEIGHTS),
    "empty": (lambda file: file.write_bytes(b""), WEIGHTS),
    "no scales": (edited(lambda tensors: tensors.pop(SCALES)), SCALES),
    "no codes": (edited(lambda tensors: tensors.pop(CODES)), CODES),
    "neither": (edited(lambda tensors: (tensors.pop(CODES), tensors.pop(SCALES))), DOWN),
    "no norm": (edited(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight"),
    "gone": (Path.unlink, "holds no weights"),
    "int32 codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].int()})), CODES),
    "float codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].float()})), CODES),
    "turned codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].T.contiguous()})), DOWN),
    "turned scales": (
        edited(lambda tensors: tensors.update({SCALES: tensors[SCALES].T.contiguous()})),
        SCALES,
    ),
    "swapped shapes": (edited(swap_shapes), DOWN),
    "too few scales": (
        edited(lambda tensors: tensors.update({SCALES: tensors[SCALES][:, :1].contiguous()})),
        SCALES,
    ),
    "one infinite scale": (edited(lambda tensors: tensors[SCALES][0, 0].fill_(torch.inf)), SCALES),
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


@pytest.mark.parametrize("verb", VERBS)
def test_a_configuration_that_describes_no_model_is_told(run, trained, verb, capsys):
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "hidden_size" in said_by(verb, run, run / "model", trained, capsys)


def test_a_model_with_code_of_its_own_is_exported_without_a_look_at_its_shapes(run):
    config = json.loads((run / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "own.Own"}, "intermediate_size": 48}
    (run / "model" / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run / "model")]) == 0


# ---------------------------------------------------------------- checkpoints of a run without a final model

SIZE_CHANGES = {
    "cut": cut,
    "gone": Path.unlink,
    **{name: DAMAGES[name][0] for name in ("no scales", "float codes", "swapped shapes")},
}


@pytest.mark.parametrize("verb", ["generate", "eval", "export"])
@pytest.mark.parametrize("damage", SIZE_CHANGES)
def test_a_checkpoint_whose_files_changed_their_size_is_named_and_passed_over(run, capsys, damage, verb):
    shutil.rmtree(run / "model")
    SIZE_CHANGES[damage](run / "checkpoint-6" / WEIGHTS)
    capsys.readouterr()
    assert main([verb, str(run), *(["--prompt", "1+2="] if verb == "generate" else [])]) == 0
    said = capsys.readouterr().err
    assert f"{run / 'checkpoint-6'} is damaged and passed over: {WEIGHTS}" in said
    assert f"{run} has no final model yet; using checkpoint-3" in said


@pytest.mark.parametrize("damage", [*SIZE_CHANGES, "one bit"])
def test_training_goes_on_from_the_last_good_checkpoint_to_the_same_end(run, trained, damage, capsys):
    shutil.rmtree(run / "model")
    {**SIZE_CHANGES, "one bit": flip_a_bit}[damage](run / "checkpoint-6" / WEIGHTS)
    capsys.readouterr()
    assert main(["train", str(run / "recipe.yaml"), f"save.dir={run}"]) == 0
    said = capsys.readouterr()
    assert "checkpoint-6" in said.out + said.err
    ours, theirs = (load_file(folder / "model" / WEIGHTS) for folder in (run, trained / "run"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
