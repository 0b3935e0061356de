"""Choosing, thinning out and setting aside checkpoint folders, without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowmem.run import checkpoint_manifest
from lowmem.run.checkpoint import (
    checkpoints_in,
    choose_newest_good,
    drop_optimizer_state_,
    has_optimizer_state,
    is_complete,
    newest_with_optimizer_state,
    seal,
    set_aside_,
    step_of,
    verify,
)
from lowmem.run.checkpoint_interval import Interval, read_interval, write_interval
from lowmem.run.checkpoint_manifest import MANIFEST, DamagedError, read_manifest

NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json")


def make(run, step):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(f"{name} of step {step}".encode())
    seal(folder, step=step)
    return folder


def test_the_manifest_lists_size_and_checksum_of_every_file_and_of_itself(tmp_path):
    content = json.loads((make(tmp_path, 3) / MANIFEST).read_text())
    assert content["step"] == 3
    assert content["files"].keys() == set(NAMES)
    assert content["files"]["optimizer.pt"]["bytes"] == len("optimizer.pt of step 3")
    assert len({one["checksum"] for one in content["files"].values()}) == len(NAMES)
    assert content["own_checksum"]


def test_the_checksum_of_an_empty_file_is_the_published_one(tmp_path):
    (tmp_path / "empty").touch()
    assert checkpoint_manifest.checksum_of(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"


def test_a_file_of_many_pieces_has_the_checksum_of_the_whole(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 33)
    whole = checkpoint_manifest.checksum_of(tmp_path / "file")
    monkeypatch.setattr(checkpoint_manifest, "READ_BYTES", 100)
    assert checkpoint_manifest.checksum_of(tmp_path / "file") == whole


def test_checkpoints_are_in_the_order_of_their_steps_and_other_folders_are_none(tmp_path):
    for step in (10, 9, 100):
        make(tmp_path, step)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-5", "damaged-checkpoint-7", ".saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").touch()
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "gone")
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [9, 10, 100]


def test_sizes_are_looked_at_for_completeness_and_content_for_verification(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"model.safetensors of step 2")
    assert is_complete(folder)
    with pytest.raises(DamagedError, match=r"model\.safetensors has other content"):
        verify(folder)


def test_the_newest_without_damage_is_chosen_and_the_reasons_name_the_files(tmp_path):
    one, two, three = (make(tmp_path, step) for step in (1, 2, 3))
    (three / "trainer_state.json").unlink()
    (two / MANIFEST).unlink()
    choice = choose_newest_good([one, two, three])
    assert choice.checkpoint == one
    assert [str(damage) for damage in choice.damaged] == [
        "checkpoint-3: trainer_state.json is missing",
        "checkpoint-2: manifest.json is missing",
    ]


def test_a_checkpoint_that_goes_away_while_it_is_verified_is_damaged_and_no_crash(tmp_path, monkeypatch):
    folder = make(tmp_path, 1)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(os.scandir(tmp_path / "gone")))
    with pytest.raises(DamagedError, match=r"gone cannot be read \(No such file or directory\)"):
        verify(folder)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "checkpoint-9")
    with pytest.raises(DamagedError, match=r"manifest\.json belongs to step 1"):
        verify(tmp_path / "checkpoint-9")


def test_without_its_optimizer_state_a_checkpoint_is_whole_but_cannot_be_continued(tmp_path):
    one, two = make(tmp_path, 1), make(tmp_path, 2)
    drop_optimizer_state_(one)
    assert sorted(path.name for path in one.iterdir()) == [
        MANIFEST,
        "model.safetensors",
        "trainer_state.json",
    ]
    assert verify(one).dropped == ("optimizer.pt", "rng_state_0.pth", "scheduler.pt")
    assert not has_optimizer_state(one)
    assert newest_with_optimizer_state([one, two]) == two


@pytest.mark.parametrize("survivors", range(4))
def test_a_crash_while_optimizer_state_is_dropped_leaves_a_whole_checkpoint(tmp_path, monkeypatch, survivors):
    folder = make(tmp_path, 1)
    real, calls = os.unlink, []

    def killed(path, **kwargs):
        calls.append(path)
        if len(calls) > survivors:
            raise KeyboardInterrupt
        real(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        if survivors < 3:
            with pytest.raises(KeyboardInterrupt):
                drop_optimizer_state_(folder)
        else:
            drop_optimizer_state_(folder)
    verify(folder)
    assert not has_optimizer_state(folder)
    drop_optimizer_state_(folder)
    assert not list(folder.glob("*.pt*"))


def test_a_crash_while_the_manifest_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = make(tmp_path, 1)
    before = read_manifest(folder)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_optimizer_state_(folder)
    assert verify(folder) == before
    assert has_optimizer_state(folder)


def test_damaged_checkpoints_are_set_aside_under_names_of_their_own(tmp_path):
    names = [set_aside_(make(tmp_path, 4)).name for _ in range(3)]
    assert names == ["damaged-checkpoint-4", "damaged-checkpoint-4-2", "damaged-checkpoint-4-3"]
    assert checkpoints_in(tmp_path) == []


def test_an_interval_is_read_back_to_the_last_bit(tmp_path):
    interval = Interval(0.1 + 0.2, 7)
    write_interval(tmp_path, interval)
    assert read_interval(tmp_path) == interval
    write_interval(tmp_path, Interval(float("nan"), 1))
    assert str(read_interval(tmp_path).loss) == "nan"
