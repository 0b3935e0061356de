"""When a lazily refreshed basis is fitted anew, and what counts as alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.numerics.linalg import leading_subspace, top_singular_vectors
from lowmem.optim.lazy_refresh import SCHEDULE, SIMILARITIES, Lazy
from lowmem.optim.low_rank import LowRank
from lowmem.optim.projections import PROJECTIONS
from lowmem.optim.refresh import Every
from lowmem.optim.rule import Context
from lowmem.optim.rules.adam import Adam
from tests.reference.lazy_refresh import LazySchedule


class Steps:
    """One parameter's steps under a schedule, without an optimizer: its state, and what Python remembers of it."""

    def __init__(self, lazy: Lazy, index: int = 0, count: int = 1):
        self.lazy, self.index, self.count = lazy, index, count
        self.state = {name: torch.zeros(slot.shape) for name, slot in lazy.slots().items()}
        self.forget()

    def forget(self) -> None:
        """What a load does."""
        self.known: dict = {}

    def at(self, step: int) -> Context:
        return Context(
            step=step, name="w", seed=0, known=self.known, stored=self.state, index=self.index, count=self.count
        )  # fmt: skip

    def refreshes(self, steps, similarity) -> list[int]:
        """The steps that were due; `similarity(step)` is found at each but the first."""
        due = []
        for step in steps:
            ctx = self.at(step)
            if not self.lazy.is_due(ctx):
                continue
            due.append(step)
            if step > 1:
                found = torch.tensor(float(similarity(step)))
                self.state |= self.lazy.adapt(lambda found=found: found, self.state, ctx)
            assert self.lazy.is_due(self.at(step)), "a step that was due stays due while it lasts"
            assert self.lazy.steps_since(self.at(step)) == 1
        return due


def lazy(gap=10, *, threshold=0.4, growth=2.0, longest=80, window=2, staggers=False) -> Lazy:
    return Lazy(
        first=Every(gap, staggers), threshold=threshold, growth=growth, longest_gap=longest, window=window
    )


def gaps(due: list[int]) -> list[int]:
    return [later - earlier for earlier, later in itertools.pairwise(due)]


def test_the_gap_grows_only_after_a_full_window_since_it_grew_last():
    due = Steps(lazy(window=3)).refreshes(range(1, 400), lambda step: 1.0)
    assert gaps(due)[:9] == [10, 10, 10, 20, 20, 20, 40, 40, 40]


def test_the_gap_never_exceeds_its_bound():
    due = Steps(lazy(longest=25)).refreshes(range(1, 500), lambda step: 1.0)
    assert gaps(due)[:4] == [10, 10, 20, 20]
    assert set(gaps(due)[4:]) == {25}


def test_bases_that_are_not_alike_are_replaced_at_the_first_gap_for_ever():
    due = Steps(lazy()).refreshes(range(1, 300), lambda step: 0.39)
    assert set(gaps(due)) == {10}


def test_one_unlike_basis_counts_until_it_leaves_the_window():
    due = Steps(lazy(window=3, threshold=0.5)).refreshes(range(1, 100), lambda step: step != 21)
    assert gaps(due)[:5] == [10, 10, 10, 20, 20], "1, 0, 1 exceeds a half"
    due = Steps(lazy(window=3, threshold=0.7)).refreshes(range(1, 100), lambda step: step != 21)
    assert gaps(due)[:7] == [10, 10, 10, 10, 10, 20, 20]


def test_a_basis_that_did_not_serve_a_whole_gap_says_nothing():
    """Parameter 1 of 10 takes its turn at step 2: a basis one step old looks like the new one."""
    steps = Steps(lazy(window=1, staggers=True), index=1, count=10)
    due = steps.refreshes(range(1, 30), lambda step: step < 5)
    assert due == [1, 2, 12, 22]


@settings(max_examples=200, deadline=None)
@given(
    gap=st.integers(1, 12),
    window=st.integers(1, 5),
    growth=st.sampled_from([1.5, 2.0, 3.0]),
    times=st.integers(1, 10),
    turn=st.tuples(st.integers(1, 7), st.integers(0, 6)),
    found=st.lists(st.sampled_from([0.0, 0.25, 0.375, 0.5, 1.0]), min_size=8, max_size=8),
    stops=st.integers(1, 40),
)
def test_the_schedule_is_that_of_the_plain_twin_also_across_loads(
    gap, window, growth, times, turn, found, stops
):
    count, index = turn[0], turn[1] % turn[0]
    setting = dict(threshold=0.375, growth=growth, window=window)
    ours = Steps(lazy(gap, longest=times * gap, staggers=True, **setting), index, count)
    twin = LazySchedule(gap=gap, longest=times * gap, offset=index * gap // count, **setting)
    for step in range(1, 160):
        if step % stops == 0:
            ours.forget()
        is_due = twin.is_due(step)
        similarity = found[step % len(found)]
        if is_due:
            twin.refreshed(step, None if step == 1 else similarity)
        assert bool(ours.refreshes([step], lambda _, s=similarity: s)) == is_due, step


def test_the_state_is_read_once_after_a_load_and_never_between_refreshes(monkeypatch):
    steps = Steps(lazy())
    steps.refreshes(range(1, 62), lambda step: 1.0)
    reads = []
    readable = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or readable(tensor))
    monkeypatch.setattr(Context, "ask", lambda *args, **kwargs: pytest.fail("a step asked the device"))
    assert not steps.refreshes(range(62, 101), lambda step: 1.0)
    assert not reads
    steps.forget()
    assert not steps.refreshes(range(62, 101), lambda step: 1.0)
    assert len(reads) == 1


def test_without_values_the_gap_stays_what_it_is_at_first():
    with FakeTensorMode():
        steps = Steps(lazy(window=1))
        assert set(gaps(steps.refreshes(range(1, 60), lambda step: 1.0))) == {10}


# ------------------------------------------------------------------ what counts as alike

M, N, RANK = 64, 160, 8


def similarity(G, P_old, P) -> float:
    rule = LowRank(inner=Adam(), projection=PROJECTIONS["svd"], rank=RANK, refresh_every=Every(1))
    return rule._similarity(G, P_old, P).item()


def random(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decaying(seed=0, power=1.0, m=M, n=N):
    """Singular values 1, 2^-power, 3^-power, ... in random directions."""
    left, right = torch.linalg.qr(random(m, m, seed)).Q, torch.linalg.qr(random(n, m, seed + 1)).Q
    return (left * torch.arange(1, m + 1).float() ** -power) @ right.mT


def test_signs_order_and_rotations_of_the_vectors_do_not_matter():
    G = decaying()
    P = top_singular_vectors(G, RANK)
    rotated = P @ torch.linalg.qr(random(RANK, RANK, 3)).Q
    for other in (P, -P, P.flip(1), rotated):
        assert similarity(G, other, P) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_a_random_subspace_counts_as_nothing_and_the_best_one_as_everything(shape):
    G = decaying()
    P = top_singular_vectors(G, RANK)
    found = [
        similarity(G if shape == (M, N) else G.mT, torch.linalg.qr(random(M, RANK, seed)).Q, P)
        for seed in range(40)
    ]
    assert sum(found) / 40 < 0.08, "without the clamp at 0 the mean would vanish"
    half = torch.cat([P[:, : RANK // 2], top_singular_vectors(decaying(seed=5), RANK)[:, RANK // 2 :]], 1)
    assert 0.1 < similarity(G, torch.linalg.qr(half).Q, P) < 0.95


@pytest.mark.parametrize("size", [1e-22, 1e18])
def test_it_does_not_depend_on_the_gradients_scale(size):
    G, P_old = decaying(), top_singular_vectors(decaying() + 0.05 * random(M, N, 9), RANK)
    P = top_singular_vectors(G, RANK)
    assert similarity(G * size, P_old, P) == pytest.approx(similarity(G, P_old, P), rel=1e-4)
    assert 0.05 < similarity(G, P_old, P) < 0.99


def test_a_warm_start_does_not_make_an_outdated_basis_look_alike():
    """On a flat spectrum one iteration keeps much of where it began, though the old directions hold little."""
    P_old = top_singular_vectors(decaying(seed=20), RANK)
    G = random(M, N, 30)
    warm = leading_subspace(G, RANK, start=P_old, generator=torch.Generator().manual_seed(0))
    angles = ((P_old.mT @ warm).square().sum() / RANK).item()
    by_chance = RANK / M
    assert angles > 2 * by_chance, "the bias that this is about"
    exact = similarity(G, P_old, top_singular_vectors(G, RANK))
    assert similarity(G, P_old, warm) == pytest.approx(exact, abs=0.1)
    assert exact < 0.2


def test_any_basis_serves_a_gradient_without_preferred_directions():
    G = torch.eye(M)
    P_old, P = torch.linalg.qr(random(M, RANK, 1)).Q, torch.linalg.qr(random(M, RANK, 2)).Q
    assert similarity(G, P_old, P) == 1


def test_a_batch_of_matrices_is_judged_as_a_whole():
    first, second = decaying(seed=1), decaying(seed=2)
    P = [top_singular_vectors(G, RANK) for G in (first, second)]
    elsewhere = top_singular_vectors(decaying(seed=3), RANK)
    G = torch.stack([first, second])
    both = similarity(G, torch.stack(P), torch.stack(P))
    one = similarity(G, torch.stack([P[0], elsewhere]), torch.stack(P))
    none = similarity(G, torch.stack([elsewhere, elsewhere]), torch.stack(P))
    assert none < one < both == pytest.approx(1, abs=1e-6)


def test_the_slots_are_scalars_that_no_storage_format_touches():
    assert {name: (slot.shape, slot.role) for name, slot in lazy(window=5).slots().items()} == {
        SCHEDULE: ((3,), "scalar"),
        SIMILARITIES: ((5,), "scalar"),
    }
