"""Five hundred ways to damage a run's checkpoints: each is detected, or changes nothing."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lowmem.hf.ending
from lowmem.errors import FaultError
from lowmem.hf.flow import train
from lowmem.hf.run_folder import RunFolder, checkpoint_to_resume
from tests.hf.tiny_runs import tiny_recipe, write_model

CASES = 500


def truncate(draw, run, file):
    file.write_bytes(file.read_bytes()[: draw.randrange(max(file.stat().st_size, 1))])


def flip_a_bit(draw, run, file):
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def zero_a_block(draw, run, file):
    data = bytearray(file.read_bytes())
    begin = draw.randrange(len(data))
    data[begin : begin + 64] = bytes(len(data[begin : begin + 64]))
    file.write_bytes(data)


def delete(draw, run, file):
    file.unlink()


def append(draw, run, file):
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def swap_within_a_checkpoint(draw, run, file):
    swap(file, draw.choice(sorted(path for path in file.parent.iterdir() if path != file)))


def swap_between_checkpoints(draw, run, file):
    (other,) = (path for path in run.glob("checkpoint-*") if path != file.parent)
    swap(file, other / file.name)


def swap_the_checkpoints(draw, run, file):
    swap(*sorted(run.glob("checkpoint-*")))


def replace_by_a_folder(draw, run, file):
    file.unlink()
    file.mkdir()


def add_a_file_that_a_library_might_prefer(draw, run, file):
    other = draw.choice(["pytorch_model.bin", "model.safetensors.index.json", "adapter_model.safetensors"])
    shutil.copy(file, file.with_name(other))


def edit_the_manifest(draw, run, file):
    manifest = file.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    name = draw.choice(sorted(content["files"]))
    edits = [
        lambda: content["files"].pop(name),
        lambda: content["files"][name].update(bytes=draw.randrange(9)),
        lambda: content["files"][name].update(checksum="0" * 32),
        lambda: content.update(step=draw.randrange(9)),
        lambda: content["dropped"].append(name),
        lambda: content.update(files=[]),
        lambda: content.pop(draw.choice(sorted(content))),
    ]
    draw.choice(edits)()
    manifest.write_text(json.dumps(content))


def garble_the_manifest(draw, run, file):
    kinds = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        draw.randbytes(50),
        b'{"own_checksum": 1}',
    ]
    file.with_name("manifest.json").write_bytes(draw.choice(kinds))


DAMAGES = [
    truncate,
    flip_a_bit,
    zero_a_block,
    delete,
    append,
    swap_within_a_checkpoint,
    swap_between_checkpoints,
    swap_the_checkpoints,
    replace_by_a_folder,
    add_a_file_that_a_library_might_prefer,
    edit_the_manifest,
    garble_the_manifest,
]


def swap(one, other):
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def content_of(checkpoint):
    """Every file but the manifest, which may be written in other words."""
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = ("save.every=2", "train.max_steps=4", "save.optimizer_states=all", "save.model=false")
    recipe = tiny_recipe(folder, write_model(folder / "model"), *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
        assert train(recipe) == 0
    return recipe, folder / "run"


def test_every_damage_is_detected_or_harmless(finished, tmp_path):
    recipe, whole = finished
    good = {path.name: content_of(path) for path in whole.glob("checkpoint-*")}
    weights = {name: load_file(whole / name / "model.safetensors") for name in good}
    draw = random.Random(7)
    counts = {"passed over": 0, "refused": 0, "harmless": 0, "other": 0}
    for case in range(CASES):
        run = tmp_path / str(case)
        shutil.copytree(whole, run)
        damage = DAMAGES[case % len(DAMAGES)]
        targets = [run / "checkpoint-4"] + ([run / "checkpoint-2"] if draw.random() < 0.2 else [])
        for target in targets:
            if target.is_dir():
                damage(draw, run, draw.choice(sorted(path for path in target.iterdir() if path.is_file())))
        said = []
        try:
            chosen = checkpoint_to_resume(recipe, RunFolder(run), said.append)
        except FaultError as error:
            counts["refused" if "holds no checkpoint without damage" in str(error) else "other"] += 1
        else:
            found = content_of(chosen)
            assert found == good[chosen.name], f"{damage.__name__} was not noticed"
            loaded = load_file(chosen / "model.safetensors")
            assert all(torch.equal(loaded[name], value) for name, value in weights[chosen.name].items())
            if chosen.name == "checkpoint-2":
                (line,) = said
                assert line.startswith("checkpoint-4 is damaged (")
                assert "; falling back to checkpoint-2" in line
                counts["passed over"] += 1
            else:
                assert said == []
                counts["harmless"] += 1
        shutil.rmtree(run)
    assert counts["passed over"] > 300
    assert counts["refused"] > 20
    assert counts["other"] == 0
    assert counts["harmless"] < 40, "such as a flipped space between two words of the manifest"


def test_damage_of_a_named_checkpoint_is_an_error_that_names_the_file(finished, tmp_path):
    _, whole = finished
    draw = random.Random(8)
    for case, name in enumerate(sorted(path.name for path in (whole / "checkpoint-4").iterdir())):
        run = tmp_path / str(case)
        shutil.copytree(whole, run)
        truncate(draw, run, run / "checkpoint-4" / name)
        named = tiny_recipe(tmp_path, tmp_path, f"resume={run / 'checkpoint-4'}", f"save.dir={run}")
        with pytest.raises(FaultError, match=rf"checkpoint-4 is damaged: {name} "):
            checkpoint_to_resume(named, RunFolder(run), pytest.fail)


def test_what_is_not_read_on_loading_may_lie_in_a_checkpoint(finished, tmp_path):
    recipe, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / "notes.txt").write_text("the good one")
    chosen = checkpoint_to_resume(recipe, RunFolder(tmp_path / "run"), pytest.fail)
    assert chosen.name == "checkpoint-4"
