"""Rows of a matrix that are updated apart, as over processes, are those of the matrix that is updated whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from lowmem.numerics.row_share import RowShare
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from tests.optim.cases import CASES, case_id, is_in_codes

STEPS = 3


class Meeting:
    """Where those that have rows of one matrix add up what they have made."""

    def __init__(self, count: int):
        self._here = threading.Barrier(count)
        self._values: list[Tensor | None] = [None] * count

    def all_of(self, who: int, x: Tensor) -> Tensor:
        self._values[who] = x.clone()
        self._here.wait(10)
        found = torch.stack([each for each in self._values if each is not None])
        self._here.wait(10)
        return found


class Share(RowShare):
    def __init__(self, who: int, meeting: Meeting, rows: int):
        self._who, self._meeting, self._rows = who, meeting, rows

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(self._meeting.all_of(self._who, x).sum(0))

    def max_(self, x: Tensor) -> Tensor:
        return x.copy_(self._meeting.all_of(self._who, x).amax(0))

    def of_all(self, rows: int) -> int:
        return self._rows


def on_rows(case: tuple[str, dict[str, Any]], shape: tuple[int, int]):
    """Of the rule for a matrix of `shape`; None where it is none for matrices, or needs all of one at once."""
    optimizer = optimizer_class(case[0])([torch.nn.Parameter(torch.zeros(shape))], **case[1])
    rule = optimizer.rule_of(optimizer.param_groups[0]["params"][0], optimizer.param_groups[0])
    return rule.on_rows(shape) if rule.scope == "matrix" else None


def weights_of(case, W: Tensor, grads: list[Tensor], share: Share | None, rows: slice) -> Tensor:
    """After a step for each gradient, of which `rows` are here."""
    name, own = case
    param = torch.nn.Parameter(W[rows].clone())
    optimizer = optimizer_class(name)([param], **own)
    [group] = optimizer.param_groups
    if share is not None:
        rule, context = on_rows(case, tuple(W.shape)).rule, optimizer._context
        optimizer.rule_of = lambda *_: rule

        def with_share(*given):
            found = context(*given)
            found.share = share
            return found

        optimizer._context = with_share
    for G in grads:
        param.grad = G[rows].clone()
        if share is not None and optimizer.rule_of(param, group).refreshes_from_gradient:
            optimizer.refresh_basis_(param, group, grad=G)
        optimizer.step()
    return param.detach()


def weights_apart(case, W: Tensor, grads: list[Tensor], cuts: list[int]) -> Tensor:
    parts = [slice(*each) for each in pairwise([0, *cuts, len(W)])]
    meeting = Meeting(len(parts))

    def work(who: int) -> Tensor:
        return weights_of(case, W, grads, Share(who, meeting, len(W)), parts[who])

    with ThreadPoolExecutor(len(parts)) as threads:
        return torch.cat(list(threads.map(work, range(len(parts)))))


def furthest(case, shape: tuple[int, int], cuts: list[int], scale: float = 1.0, zeros: bool = False) -> float:
    """The largest difference to the matrix that is updated whole, over the distance moved."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    grads = [scale * torch.randn(shape, generator=generator) for _ in range(STEPS)]
    for G in grads if zeros else []:
        G[:, 0] = 0
        G[0] = 0
    whole = weights_of(case, W, grads, None, slice(None))
    moved = (whole - W).abs().max().item()
    assert moved > 0
    return (weights_apart(case, W, grads, cuts) - whole).abs().max().item() / moved


DIVIDED = [case for case in CASES if not is_in_codes(case) and on_rows(case, (40, 12)) is not None]


def test_every_rule_that_needs_little_of_its_rows_is_tried():
    assert {name for name, _ in DIVIDED} >= {"adafactor", "apollo", "fira", "frugal", "galore", "sinkgd"}
    assert {name for name, _ in DIVIDED} <= set(OPTIMIZERS)


@pytest.mark.parametrize("case", DIVIDED, ids=case_id)
@settings(max_examples=8, deadline=None)
@given(st.integers(13, 60), st.sets(st.integers(1, 12), min_size=1, max_size=3))
@example(rows=24, cuts={12})  # as many rows as columns
@example(rows=13, cuts={1, 2})
def test_rows_apart_make_the_steps_of_the_whole_matrix(case, rows, cuts):
    assert furthest(case, (rows, 12), sorted(cuts)) < 2e-4


@pytest.mark.parametrize("case", DIVIDED, ids=case_id)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_rows_and_columns_of_zeros_and_other_sizes_make_no_difference(case, scale):
    assert furthest(case, (40, 12), [7, 30], scale=scale, zeros=True) < 2e-4


@pytest.mark.parametrize("case", DIVIDED, ids=case_id)
def test_rows_of_a_wide_matrix_are_updated_apart_only_where_no_basis_is_one_of_rows(case):
    wide = on_rows(case, (12, 40))
    assert (wide is None) == (
        case[0] not in ("adafactor", "sinkgd")
        and case[1].get("projection") != "columns"
        and not (case[0] == "frugal" and "projection" not in case[1])
    )
    if wide is not None:
        assert furthest(case, (12, 40), [5]) < 2e-4
