from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from lowmem.hf.flow import train
from lowmem.hf.memory_snapshot import SnapshotOfAStep
from tests.hf.tiny_runs import tiny_recipe, write_model


def events(callback: SnapshotOfAStep, device: str, first: int, last: int) -> None:
    """What the Trainer calls over the steps from `first` to `last`."""
    args = SimpleNamespace(device=torch.device(device))
    state, control = TrainerState(global_step=first - 1, max_steps=last), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(first, last + 1):
        state.global_step = step - 1
        callback.on_step_begin(args, state, control)
        state.global_step = step
        callback.on_step_end(args, state, control)


@pytest.mark.parametrize(("first", "last", "step"), [(1, 10, 3), (1, 2, 2), (5, 20, 7)])
def test_one_step_on_cuda_is_recorded_and_written(tmp_path, monkeypatch, first, last, step):
    calls = []
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", **kwargs: calls.append(("record", enabled)),
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(("dump", path)))
    said = []
    events(SnapshotOfAStep(tmp_path / "snapshot.pickle", said.append), "cuda", first, last)
    assert calls == [("record", "all"), ("dump", str(tmp_path / "snapshot.pickle")), ("record", None)]
    assert f"memory snapshot of step {step}: " in said[0]


def test_a_run_on_a_cpu_says_that_it_takes_no_snapshot(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    assert train(tiny_recipe(tmp_path, model, "report.memory_snapshot=true", "save.model=false")) == 0
    assert "report.memory_snapshot: only CUDA's allocator keeps a history" in capsys.readouterr().out
    assert not (tmp_path / "run" / "memory_snapshot.pickle").exists()
