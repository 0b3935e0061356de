from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.errors import RefusedError
from lowmem.memory.simulate import Simulation


def answered(work, **real: Tensor):
    """What `work` returns on fake tensors whose values are known."""
    simulation = Simulation()
    with simulation.tensors():
        return work(**simulation.batch(real))


def test_a_fake_batch_answers_questions_about_its_values():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert answered(lambda mask: bool(mask.bool().all()), mask=mask) is False
    assert answered(lambda mask: int(mask.sum()), mask=mask) == 5
    assert answered(lambda mask: mask.sum(1).tolist(), mask=mask) == [3, 2]


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_shapes_that_depend_on_values_are_those_of_the_real_tensor(numbers):
    labels = torch.tensor(numbers)

    def trained(labels):
        where = (labels != -100).nonzero().squeeze(1)
        return tuple(where.shape), labels[where].min().item() if len(where) else None, type(where)

    shape, lowest, kind = answered(trained, labels=labels)
    kept = labels[labels != -100]
    assert shape == tuple(kept.shape)
    assert lowest == (kept.min().item() if len(kept) else None)
    assert kind is FakeTensor, "its bytes are counted like all others"


def test_changes_in_place_are_followed_through_views():
    def work(ids):
        row = ids[0]
        row += 5
        ids[1].fill_(7)
        return ids.tolist()

    assert answered(
        lambda ids: [row.tolist() for row in (work(ids) and ids)], ids=torch.zeros(2, 2).long()
    ) == [
        [5, 5],
        [7, 7],
    ]


def test_a_value_mixed_with_an_unknown_one_is_no_longer_known():
    def work(ids):
        ids.add_(torch.empty(3, dtype=torch.int64).random_(5))
        return bool((ids == 0).all())

    with pytest.raises(RefusedError, match="cannot be planned without values"):
        answered(work, ids=torch.zeros(3, dtype=torch.int64))


def test_an_unknown_number_is_one_and_an_unknown_truth_is_refused():
    simulation = Simulation()
    with simulation.tensors():
        loss = torch.randn(4).mean()
        assert loss.item() == 1.0
        with pytest.raises(RefusedError, match=r"lowmem train with train\.max_steps"):
            bool(loss > 0)


def test_the_real_batch_is_neither_changed_nor_kept():
    ids = torch.arange(4)
    answered(lambda ids: ids.mul_(0), ids=ids)
    assert ids.tolist() == [0, 1, 2, 3]


def test_nothing_of_the_models_size_is_computed():
    simulation = Simulation()
    with simulation.tensors():
        big = torch.zeros(2**40, dtype=torch.int64)
        assert (big + 1).shape == (2**40,)
