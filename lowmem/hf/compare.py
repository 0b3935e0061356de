"""Several optimizers on exactly the same work: the batches are made once, each method has its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.baseline import single_process_environment
from lowmem.hf.compared_batches import Say, checksum, num_tokens, save_work
from lowmem.hf.compared_run import timed_steps
from lowmem.hf.launch import launched_strategy
from lowmem.hf.metering import steps_to_watch
from lowmem.hf.recorded_batches import BatchRecorder
from lowmem.memory.comparison import Method, comparison_document
from lowmem.recipe.dump import dump_recipe


@dataclass(frozen=True)
class Compared:
    """`document` is None when nothing was measured before a Ctrl-C."""

    document: dict[str, Any] | None
    was_interrupted: bool


def compare(name: str, methods: Sequence[Method], *, steps: int, say: Say) -> Compared:
    """Measure each method on the first `steps` optimizer steps of the recipe called `name`, one after another.

    All methods have the same recipe but for the optimizer. One that fails has its reason in the document,
    and the others go on; so have those that a Ctrl-C kept from being measured.
    Raises RecipeError for what is wrong with the data or `steps`, RefusedError for a distributed launch.
    """
    refuse_several_processes()
    refuse_too_few(steps)
    recipe = methods[0].recipe
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        batches = save_work(recipe, steps, work, say)
        refuse_broken_off_step(batches)
        with sigterm_as_ctrl_c():
            was_interrupted = False
            try:
                for number, method in enumerate(methods, start=1):
                    say(f"measuring {method.title} ({number} of {len(methods)}) ...")
                    found.append(measure(method, work, batches))
                    if "reason" in found[-1]:
                        say(f"{method.title} was not measured: {found[-1]['reason']}")
            except KeyboardInterrupt:
                was_interrupted = True
    if not any("reason" not in each for each in found) and was_interrupted:
        return Compared(None, was_interrupted)
    found += [{"reason": "interrupted before it was measured"}] * (len(methods) - len(found))
    watched = sorted(steps_to_watch(1, steps))
    document = comparison_document(
        name,
        list(zip(methods, found, strict=True)),
        steps=steps,
        watched_steps=watched,
        timed_steps=timed_steps(steps),
        # Of the steps whose memory is counted: a longer row elsewhere has no part in it.
        sequence_length=max(
            batch["input_ids"].shape[-1] for step in watched for batch in batches.steps[step - 1]
        ),
    )
    return Compared(document, was_interrupted)


def refuse_several_processes() -> None:
    """Raise RefusedError in a launch of several processes, or one that shards the model."""
    launched = launched_strategy()
    if launched != "single":
        raise RefusedError(
            f"{launched} was launched, and lowmem compare measures one process on one device: what data parallelism "
            "adds is the same for every optimizer. Run lowmem compare without a launcher."
        )


def refuse_too_few(steps: int) -> None:
    if steps < fewest_steps():
        raise RecipeError(
            f"lowmem compare: --steps is {steps}; it must be at least {fewest_steps()}. The first two warm up, and a "
            "step in which memory is counted is too slow to be timed."
        )


def fewest_steps() -> int:
    """The smallest number of steps of which one can be timed."""
    return next(number for number in count(1) if timed_steps(number))


def refuse_broken_off_step(batches: BatchRecorder) -> None:
    """Raise RecipeError where an epoch ends within a step: that step is smaller than the others."""
    sizes = [len(step) for step in batches.steps]
    whole = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if whole is not None:
        fewer = f"--steps {whole}, " if whole >= fewest_steps() else ""
        raise RecipeError(
            f"lowmem compare: the rows of data.train end within step {whole + 1}, which has {sizes[whole]} of "
            f"{sizes[0]} micro-batches, and every measured step must be a whole one. Use {fewer}more rows, or "
            "train.gradient_accumulation_steps=1."
        )


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt too, so that no method is left running alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(method: Method, work: Path, batches: BatchRecorder) -> dict[str, Any]:
    """What a fresh process found out about one method, or {"reason": why it did not}.

    A KeyboardInterrupt ends that process before it goes on.
    """
    recipe_file, out = work / "recipe.yaml", work / "found.json"
    recipe_file.write_text(dump_recipe(method.recipe), encoding="utf-8")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lowmem.hf.compared_run", str(recipe_file), str(work), str(out)]
    command += [] if method.torch_variant is None else [method.torch_variant]
    code, said = run_to_the_end(command)
    if code == -signal.SIGKILL:
        return {"reason": "its process was killed, as the system does when memory runs out"}
    if code != 0 or not out.is_file():
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return {"reason": f"its process ended with code {code}: {last}"}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "reason" not in found:
        assert found["batch_checksums"] == [checksum(step) for step in batches.steps], "the same batches"
        found["tokens"] = sum(num_tokens(step) for step in batches.steps)
    return found


def run_to_the_end(command: list[str]) -> tuple[int, str]:
    """Exit code and standard error. Whatever ends the waiting ends the process, and its memory is free again."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env=single_process_environment(), stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return code, said.read().decode(errors="replace")
