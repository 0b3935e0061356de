"""The processes of one launch fail together, and one of them says why.

A launcher such as torchrun or `accelerate launch` keeps a store that its processes can all reach before they have
joined a process group, and after one of them has died. What is said here goes through it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from lowmem.errors import FaultError, LowMemError, RecipeError, RefusedError

if TYPE_CHECKING:
    from torch.distributed import Store

WAIT_SECONDS = 1800
"""For the slowest process to come so far; as long as transformers waits for one that trains."""

_meetings = 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """A problem that one process has inside is raised in all of them, in all the same; every process must come here.

    Raises what the first process with a problem has raised, or FaultError when a process does not come.
    """
    mine = None
    try:
        yield
    except LowMemError as error:
        mine = error
    store = _store()
    if store is None:
        if mine is not None:
            raise mine
        return
    problems = _exchanged(store, mine)
    if not problems:
        return
    first = min(problems)
    if mine is not None and len(problems) == _processes():
        raise mine
    raise _remade(problems[first])


@contextmanager
def one_tells() -> Iterator[None]:
    """A problem leaves this by one process a machine, the first to have it; the others end with its exit code."""
    try:
        yield
    except LowMemError as error:
        if _is_first_to_tell(error):
            raise
        raise SystemExit(error.exit_code) from error


def has_lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective has failed because another process of the launch is gone."""
    from torch import distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _exchanged(store: Store, mine: LowMemError | None) -> dict[int, dict[str, str]]:
    """The problems of all processes, by rank."""
    global _meetings
    _meetings += 1
    rank, problems = int(os.environ["RANK"]), {}
    told = (
        {} if mine is None else {"kind": type(mine).__name__, "text": str(mine), "host": socket.gethostname()}
    )
    store.set(f"{_meetings}/{rank}", json.dumps(told))
    for other in range(_processes()):
        try:
            found = json.loads(store.get(f"{_meetings}/{other}"))
        except RuntimeError as error:
            raise FaultError(
                f"process {other} of this launch did not come through the set-up. Look at what its machine says, and "
                "start the launch again on all machines."
            ) from error
        if found:
            problems[other] = {**found, "process": str(other)}
    return problems


def _remade(problem: dict[str, str]) -> LowMemError:
    kinds = {kind.__name__: kind for kind in (RecipeError, RefusedError, FaultError)}
    text = f"process {problem['process']}, on {problem['host']}: {problem['text']}"
    return kinds.get(problem["kind"], LowMemError)(text)


def _is_first_to_tell(error: LowMemError) -> bool:
    store = _store()
    if store is not None:
        try:
            return bool(store.add(f"told/{os.environ.get('GROUP_RANK', '0')}", 1) == 1)
        except RuntimeError:
            return True  # the launcher that kept it is gone
    return isinstance(error, FaultError) or int(os.environ.get("RANK", "0")) == 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def _store() -> Store | None:
    """None for a single process, and for a launcher that keeps none."""
    if _processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch import distributed as dist

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        _processes(),
        is_master=False,
        timeout=timedelta(seconds=WAIT_SECONDS),
    )
    return dist.PrefixStore("lowmem", store)
