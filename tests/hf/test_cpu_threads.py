"""A tiny model takes one CPU thread, unless the user has chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.hf.cpu_threads import TINY_PARAMETERS, use_one_thread_for_tiny_model


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def test_a_tiny_model_takes_one_thread_and_says_so():
    said = []
    use_one_thread_for_tiny_model(nn.Linear(8, 8), said.append)
    assert torch.get_num_threads() == 1
    assert said == ["threads: 1, which suits a model this small; OMP_NUM_THREADS sets another number"]


def test_a_larger_model_and_a_users_choice_are_left_alone(monkeypatch):
    said = []
    use_one_thread_for_tiny_model(nn.Linear(2, TINY_PARAMETERS // 2, bias=False), said.append)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    use_one_thread_for_tiny_model(nn.Linear(8, 8), said.append)
    assert torch.get_num_threads() == 2
    assert not said
