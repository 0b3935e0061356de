"""Of several processes of a launch all fail, and one tells why."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lowmem.errors import FaultError, RecipeError, RefusedError
from lowmem.run import one_voice
from lowmem.run.one_voice import all_or_none, one_tells


@pytest.fixture
def store(monkeypatch):
    """That of a launch of two processes, of which this is the first."""
    made = HashStore()
    made.set_timeout(timedelta(seconds=0.1))
    monkeypatch.setattr(one_voice, "_store", lambda: made)
    monkeypatch.setattr(one_voice, "_meetings", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    return made


def other_says(store, **problem: str) -> None:
    store.set("1/1", json.dumps(problem))


def test_nothing_happens_where_all_come_through(store):
    other_says(store)
    with all_or_none():
        pass
    assert json.loads(store.get("1/0")) == {}


def test_a_problem_of_another_process_is_raised_here_and_says_whose_it_is(store):
    other_says(store, kind="RefusedError", text="no such thing", host="there")
    with pytest.raises(RefusedError, match="^process 1, on there: no such thing$"), all_or_none():
        pass


def test_a_problem_that_all_have_is_told_as_it_is(store):
    other_says(store, kind="RecipeError", text="no such key", host="there")
    with pytest.raises(RecipeError, match="^no such key$"), all_or_none():
        raise RecipeError("no such key")


def test_a_process_that_does_not_come_is_named(store):
    with pytest.raises(FaultError, match="process 1 of this launch did not come"), all_or_none():
        pass


def test_the_first_process_of_a_machine_tells_and_the_others_end_with_the_same_code(store, monkeypatch):
    for machine in ("0", "1"):
        monkeypatch.setenv("GROUP_RANK", machine)
        with pytest.raises(RefusedError), one_tells():
            raise RefusedError("no")
        with pytest.raises(SystemExit) as silent, one_tells():
            raise FaultError("lost")
        assert silent.value.code == FaultError.exit_code


def test_a_single_process_raises_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RefusedError), one_tells(), all_or_none():
        raise RefusedError("no")
