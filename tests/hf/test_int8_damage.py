"""Int8 folders and checkpoints that are damaged: every verb says where, in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowmem.hf.ending
from lowmem.cli.main import main
from lowmem.hf.flow import train
from tests.hf.tiny_runs import tiny_recipe, write_model, write_recipe

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
CODES, SCALES = f"{DOWN}.weight_codes", f"{DOWN}.weight_scales"
VERBS = ("train", "generate", "eval", "export")
SETTINGS = (
    "model.weights=int8",
    "model.int8.group_size=16",
    "save.int8=true",
    "save.every=3",
    "save.optimizer_states=all",
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run that has two checkpoints and a final model, all in int8."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowmem.hf.ending, "write_report", lambda where: where / "report.md")
        assert train(tiny_recipe(folder, write_model(folder / "start"), *SETTINGS)) == 0
    return folder


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return edit


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit_of_the_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[7] ^= 1  # of the header's length
    file.write_bytes(bytes(content))


def swap_shapes(tensors: dict[str, Tensor]) -> None:
    tensors[CODES] = tensors[CODES].T.contiguous()
    tensors[SCALES] = torch.ones(24, 1)


DAMAGES = {
    "cut short": (cut_short, WEIGHTS),
    "header": (flip_a_bit_of_the_header, WEIGHTS),
    "gone": (Path.unlink, "holds no weights"),
    "no scales": (edited(lambda tensors: tensors.pop(SCALES)), SCALES),
    "no codes": (edited(lambda tensors: tensors.pop(CODES)), CODES),
    "neither": (edited(lambda tensors: (tensors.pop(CODES), tensors.pop(SCALES))), DOWN),
    "no norm": (edited(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight"),
    "float codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].float()})), CODES),
    "int32 codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].int()})), CODES),
    "flipped codes": (edited(lambda tensors: tensors.update({CODES: tensors[CODES].T.contiguous()})), DOWN),
    "swapped shapes": (edited(swap_shapes), DOWN),
    "too few scales": (edited(lambda tensors: tensors.update({SCALES: tensors[SCALES][:, :1].contiguous()})), SCALES),
    "nan scales": (edited(lambda tensors: tensors[SCALES].fill_(float("nan"))), SCALES),
    "infinite scale": (edited(lambda tensors: tensors[SCALES][0, 0].fill_(float("inf"))), SCALES),
}  # fmt: skip


def arguments_for(verb: str, folder: Path) -> list[str]:
    if verb == "train":
        recipe = write_recipe(folder, folder / "run" / "model")
        return ["train", str(recipe), "model.weights=int8", f"save.dir={folder / 'next'}"]
    return [verb, str(folder / "run"), *(["--prompt", "1+2="] if verb == "generate" else [])]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_verb_names_what_is_damaged_in_a_model_folder(finished, tmp_path, capfd, damage, verb):
    shutil.copytree(finished / "run", tmp_path / "run")
    do, named = DAMAGES[damage]
    do(tmp_path / "run" / "model" / WEIGHTS)
    capfd.readouterr()
    assert main(arguments_for(verb, tmp_path)) == 2
    said = capfd.readouterr().err
    assert named in said
    assert "Traceback" not in said
    left = {path.name for path in tmp_path.iterdir()} - {"sums.yaml", "train.jsonl", "held_out.jsonl"}
    assert left <= {"run", "next"}


def broken_config(file: Path) -> None:
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_tells_a_configuration_that_describes_no_model(finished, tmp_path, capfd, verb):
    shutil.copytree(finished / "run", tmp_path / "run")
    broken_config(tmp_path / "run" / "model" / WEIGHTS)
    capfd.readouterr()
    assert main(arguments_for(verb, tmp_path)) == 2
    said = capfd.readouterr().err
    assert "hidden_size" in said
    assert "Traceback" not in said


def test_a_model_with_code_of_its_own_is_exported_without_a_look_at_its_shapes(finished, tmp_path):
    shutil.copytree(finished / "run" / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "own.Own"}, "intermediate_size": 48}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["export", str(tmp_path / "model")]) == 0


# ---------------------------------------------------------------- checkpoints, which have checksums


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(bytes(content))


CHECKPOINT_DAMAGES = {
    "cut short": cut_short,
    "one bit": flip_a_bit,
    "gone": Path.unlink,
    "no scales": DAMAGES["no scales"][0],
    "float codes": DAMAGES["float codes"][0],
    "swapped shapes": DAMAGES["swapped shapes"][0],
}


@pytest.fixture
def without_a_final_model(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path


@pytest.mark.parametrize("verb", ["generate", "eval", "export"])
@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_named_and_never_used(without_a_final_model, capfd, damage, verb):
    """One whose files are not all there in their sizes is passed over; other damage is found by the checksums."""
    run = without_a_final_model / "run"
    CHECKPOINT_DAMAGES[damage](run / "checkpoint-6" / WEIGHTS)
    capfd.readouterr()
    code = main(arguments_for(verb, without_a_final_model))
    said = capfd.readouterr().err
    assert f"{run / 'checkpoint-6'} is damaged" in said
    assert WEIGHTS in said
    assert code == (2 if damage == "one bit" else 0)
    assert (code == 2) != (f"{run} has no final model yet; using checkpoint-3" in said)
    assert "Traceback" not in said


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_training_goes_on_from_the_last_good_checkpoint_to_the_same_end(
    finished, without_a_final_model, damage, capfd
):
    run = without_a_final_model / "run"
    CHECKPOINT_DAMAGES[damage](run / "checkpoint-6" / WEIGHTS)
    capfd.readouterr()
    assert main(["train", str(run / "recipe.yaml"), f"save.dir={run}"]) == 0
    said = capfd.readouterr()
    assert "checkpoint-6" in said.out + said.err
    ours, theirs = (load_file(folder / "model" / WEIGHTS) for folder in (run, finished / "run"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
