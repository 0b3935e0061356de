"""Several optimizers on the same work: the same batches, weights, settings and meter for every one."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

import lowmem.hf.compare
import lowmem.hf.compared_run
import lowmem.hf.ending
from lowmem.cli.compared_methods import read_methods
from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.adamw_variants import adamw_variants
from lowmem.hf.baseline import measure_variant
from lowmem.hf.compare import compare, run_to_the_end
from lowmem.hf.compared_batches import TRAIN, save_work
from lowmem.hf.compared_run import main, timed_steps
from lowmem.hf.flow import train
from lowmem.hf.interrupt import Interrupt
from lowmem.hf.metering import StepWatch, steps_to_watch
from lowmem.hf.recorded_batches import BatchRecorder, RecordedBatches
from lowmem.hf.setup import prepare_run
from lowmem.memory.comparison import TORCH_ADAMWS
from lowmem.recipe.load import load_recipe
from tests.hf.tiny_runs import write_model, write_recipe


def test_the_names_of_torchs_adamws_are_those_that_can_be_made():
    assert list(adamw_variants(0.0, 0.0)) == list(TORCH_ADAMWS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")


@pytest.fixture
def processes(monkeypatch):
    """The command lines of the processes, which run in this one: without the seconds of a new interpreter."""
    commands = []

    def run(command):
        assert command[1:3] == ["-m", "lowmem.hf.compared_run"]
        commands.append(command[3:])
        return main(command[3:]), ""

    monkeypatch.setattr(lowmem.hf.compare, "run_to_the_end", run)
    return commands


@pytest.fixture
def methods_of(tmp_path, model_folder):
    path = write_recipe(tmp_path, model_folder)

    def methods(wanted, *overrides):
        return read_methods(load_recipe(path, overrides), str(path), list(overrides), [wanted], say=silent)

    return methods


def silent(text):
    pass


def compared(methods, steps):
    found = compare("sums", methods, steps=steps, say=silent)
    assert not found.was_interrupted
    json.dumps(found.document, allow_nan=False)
    return {entry["method"]: entry for entry in found.document["methods"]}, found.document


def batches_of_a_run(recipe):
    """The micro-batches that a real run of `recipe` is given, all its steps."""
    run = prepare_run(recipe, Interrupt())
    run.watch.choose_steps = lambda first, last: run.watch.steps.update(range(first, last + 1))
    run.watch.begin_step = lambda step: None  # nothing needs measuring
    run.trainer.train()
    return run.batches.steps


@pytest.mark.parametrize(
    ("steps", "overrides"),
    [
        (12, []),  # 40 rows in batches of 4: the first epoch ends after step 10
        (6, ["train.gradient_accumulation_steps=2", "train.seed=5"]),
        (4, ["data.packing=true", "train.per_device_batch_size=1"]),
    ],
)
def test_the_batches_are_those_of_a_run_in_its_own_order(tmp_path, methods_of, steps, overrides):
    (method,) = methods_of("recipe", f"train.max_steps={steps}", *overrides)
    recorded = save_work(method.recipe, steps, tmp_path, silent).steps
    wanted = batches_of_a_run(method.recipe)
    assert len(recorded) == len(wanted) == steps
    for ours, theirs in zip(recorded, wanted, strict=True):
        assert [list(batch) for batch in ours] == [list(batch) for batch in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({step[0]["input_ids"].numpy().tobytes() for step in recorded}) > 1


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.gradient_accumulation_steps=2"],
        ["lora={r: 2, dropout: 0.3}", "data.packing=true", "train.per_device_batch_size=1"],
    ],
    ids=["accumulated", "lora, packed"],
)
def test_every_method_sees_the_same_batches_from_the_same_weights(tmp_path, methods_of, overrides):
    methods = methods_of(f"adamw,sgd,sgd_sai,{','.join(TORCH_ADAMWS)}", *overrides)
    found, document = compared(methods, steps=4)
    assert list(found) == ["recipe", "adamw", "sgd", "sgd_sai", *TORCH_ADAMWS]
    assert all(entry["reason"] is None for entry in found.values())
    wanted = []  # the checksums, computed here from the batches of a run
    for step in batches_of_a_run(methods_of("recipe", "train.max_steps=4", *overrides)[0].recipe):
        digest = hashlib.blake2b(digest_size=8)
        for batch in step:
            ids = batch["input_ids"]
            digest.update(f"{tuple(ids.shape)} torch.int64 ".encode() + ids.numpy().tobytes())
        wanted.append(digest.hexdigest())
    assert len(set(wanted)) == 4
    assert all(entry["batch_checksums"] == wanted for entry in found.values())
    in_backward = {"adamw_fused_backward"} if "train.gradient_accumulation_steps=2" in overrides else set()
    first = {entry["losses"][0] for name, entry in found.items() if name not in in_backward}
    assert len(first) == 1, "to the last bit"
    assert len({entry["tokens"] for entry in found.values()}) == 1
    assert len({entry["losses"][-1] for entry in found.values() if entry["losses_compare"]}) > 3
    assert document["conditions"]["lora"] is ("lora" in overrides[0])


@pytest.mark.usefixtures("processes")
def test_the_recipes_own_optimizer_does_what_its_run_does(tmp_path, methods_of):
    settings = ("train.max_steps=8", "report.log_every=1", "train.lr_scheduler.name=linear")
    (method,) = methods_of("recipe", *settings)
    found, document = compared([method], steps=8)
    assert train(method.recipe) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["recipe"]["losses"] == [row["loss"] for row in rows if "loss" in row]
    assert [found["recipe"]["held_out_loss"]] == [row["eval_loss"] for row in rows if "eval_loss" in row]
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert found["recipe"]["parts"] == memory["parts"]
    assert found["recipe"]["peak_bytes"] == memory["peak_bytes"]
    shared = document["conditions"].keys() & memory["conditions"].keys()
    assert len(shared) > 10
    assert {name: document["conditions"][name] for name in shared} == {
        name: memory["conditions"][name] for name in shared
    }


@pytest.mark.usefixtures("processes")
def test_torchs_adamws_need_what_the_baseline_of_a_run_measures(tmp_path, methods_of):
    found, _ = compared(methods_of(",".join(TORCH_ADAMWS)), steps=6)
    (method,) = methods_of("recipe")
    everything, watched = save_work(method.recipe, 6, tmp_path, silent), BatchRecorder()
    for step in sorted(steps_to_watch(1, 6)):
        watched(step, everything.steps[step - 1])
    watched.save(tmp_path / TRAIN)
    batches = RecordedBatches(tmp_path / TRAIN)
    for name, optimizer_of in adamw_variants(3e-3, 0.0).items():
        gc.collect()
        baseline = measure_variant(method.recipe, batches, optimizer_of, tmp_path / name)
        assert found[name]["parts"] == baseline.parts
        assert found[name]["peak_bytes"] == baseline.peak_bytes
        assert found[name]["saved_bytes"] == found["adamw_fused"]["peak_bytes"] - baseline.peak_bytes
    state = found["adamw_fused"]["parts"]["optimizer_state"]
    assert found["adamw_fused"]["optimizer_state_bytes"] == state
    assert found["recipe"]["optimizer_state_bytes"] < state


@pytest.mark.usefixtures("processes")
def test_no_loss_of_updates_within_backward_is_compared(methods_of):
    found, _ = compared(methods_of("adamw_fused_backward"), steps=4)
    assert not found["adamw_fused_backward"]["losses_compare"]
    assert found["adamw_fused_backward"]["held_out_loss"] is None
    assert found["recipe"]["losses_compare"]
    assert found["recipe"]["held_out_tokens"] > 0


@pytest.mark.parametrize("steps", [*range(1, 12), 30])
def test_a_timed_step_is_never_one_in_which_memory_is_counted(steps):
    timed = timed_steps(steps)
    assert not set(timed) & steps_to_watch(1, steps)
    assert set(timed) | steps_to_watch(1, steps) == set(range(1, steps + 1))
    assert (timed == []) is (steps < 4)


@pytest.mark.usefixtures("processes")
def test_seconds_are_those_of_the_steps_without_the_meter(methods_of, monkeypatch):
    """A clock that gives one second to step 1, two to step 2, and so on."""
    times = (number for step in range(1, 8) for number in (100.0 * step, 100.0 * step + step))
    monkeypatch.setattr(lowmem.hf.compared_run, "_now", lambda device: next(times))
    found, document = compared(methods_of("recipe"), steps=7)
    assert document["watched_steps"] == [1, 2, 5]
    assert document["timed_steps"] == [3, 4, 6, 7]
    entry = found["recipe"]
    assert entry["timed_seconds"] == [3, 4, 6, 7]
    assert entry["step_seconds"] == {"median": 5, "min": 3, "max": 7}
    assert entry["tokens_per_second"] < entry["tokens"]


def test_too_few_steps_are_refused_with_the_smallest_number_that_works(methods_of):
    for steps in (-1, 0, 3):
        with pytest.raises(RecipeError, match=f"--steps is {steps}; it must be at least 4"):
            compare("sums", methods_of("sgd"), steps=steps, say=silent)


@pytest.mark.parametrize(
    ("accumulated", "said"),
    [
        (
            4,
            r"step 3, which has 2 of 4 micro-batches, .* Use more rows, or train.gradient_accumulation_steps=1",
        ),
        (3, r"step 4, which has 1 of 3 micro-batches, .* Use more rows"),
    ],
)
def test_a_step_that_the_end_of_the_rows_cuts_short_is_refused(methods_of, processes, accumulated, said):
    """40 rows are 10 micro-batches of 4."""
    methods = methods_of("sgd", f"train.gradient_accumulation_steps={accumulated}")
    with pytest.raises(RecipeError, match=said):
        compare("sums", methods, steps=5, say=silent)
    assert processes == []


def test_the_largest_number_of_whole_steps_is_named_where_it_is_enough(methods_of):
    settings = ("train.gradient_accumulation_steps=2", "train.per_device_batch_size=3")
    methods = methods_of(
        "sgd", *settings, "data.train.take=33"
    )  # 11 micro-batches: 5 steps of 2 and one of 1
    with pytest.raises(
        RecipeError, match="step 6, which has 1 of 2 micro-batches, .* Use --steps 5, more rows"
    ):
        compare("sums", methods, steps=7, say=silent)


def test_a_launch_of_several_processes_is_refused(methods_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RefusedError, match="ddp was launched, and lowmem compare measures one process"):
        compare("sums", methods_of("sgd"), steps=5, say=silent)


def test_a_method_that_fails_has_its_reason_and_the_others_go_on(methods_of, monkeypatch, processes):
    real = lowmem.hf.compared_run.make_optimizer

    def make_optimizer(model, recipe, **tokens):
        if recipe.optimizer.name == "sgd":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(model, recipe, **tokens)

    monkeypatch.setattr(lowmem.hf.compared_run, "make_optimizer", make_optimizer)
    said = []
    found = compare(
        "sums", methods_of("sgd,galore:target=[nowhere],adamw"), steps=4, say=said.append
    ).document["methods"]
    reasons = {entry["method"]: entry["reason"] for entry in found}
    assert reasons["recipe"] is reasons["adamw"] is None
    assert reasons["sgd"] == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "nowhere" in reasons["galore:target=[nowhere]"]
    assert "sgd was not measured: out of memory" in "\n".join(said)
    failed = next(entry for entry in found if entry["method"] == "sgd")
    assert failed["peak_bytes"] is failed["losses"] is failed["step_seconds"] is None
    assert failed["settings"]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (1, "Traceback\nValueError: odd\n", "its process ended with code 1: ValueError: odd"),
        (-signal.SIGKILL, "", "its process was killed, as the system does when memory runs out"),
    ],
)
def test_a_process_that_dies_is_a_method_that_failed(methods_of, monkeypatch, code, said, reason):
    monkeypatch.setattr(lowmem.hf.compare, "run_to_the_end", lambda command: (code, said))
    found, document = compared(methods_of("sgd"), steps=4)
    assert [entry["reason"] for entry in found.values()] == [reason, reason]
    assert document["environment"] is None


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("before", [0, 1])
def test_ctrl_c_keeps_what_was_measured(methods_of, monkeypatch, before):
    real, calls = lowmem.hf.compare.run_to_the_end, []

    def run(command):
        calls.append(1)
        if len(calls) > before:
            signal.raise_signal(signal.SIGTERM)  # which is to end it as Ctrl-C does
        return real(command)

    monkeypatch.setattr(lowmem.hf.compare, "run_to_the_end", run)
    handler = signal.getsignal(signal.SIGTERM)
    found = compare("sums", methods_of("sgd,adamw"), steps=4, say=silent)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert found.was_interrupted
    assert len(calls) == before + 1
    if not before:
        assert found.document is None
        return
    reasons = [entry["reason"] for entry in found.document["methods"]]
    assert reasons == [None] + ["interrupted before it was measured"] * 2


def test_the_watch_of_the_reader_measures_nothing(tmp_path, methods_of, monkeypatch):
    monkeypatch.setattr(StepWatch, "begin_step", lambda *args: pytest.fail("a step was watched"))
    (method,) = methods_of("recipe")
    assert len(save_work(method.recipe, 4, tmp_path, silent).steps) == 4


CHILD = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
print("RANK" in os.environ, file=sys.stderr, flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def test_the_sequence_length_is_that_of_the_steps_whose_memory_is_counted(methods_of, monkeypatch):
    monkeypatch.setattr(lowmem.hf.compare, "run_to_the_end", lambda command: (1, "odd"))
    real = lowmem.hf.compare.save_work

    def save_work(*args):
        batches = real(*args)
        batches.steps[2] = [{"input_ids": torch.zeros(1, 9999)}]  # step 3 is timed, not watched
        return batches

    monkeypatch.setattr(lowmem.hf.compare, "save_work", save_work)
    assert 8 <= compared(methods_of("sgd"), steps=4)[1]["conditions"]["sequence_length"] < 64


def test_a_process_is_waited_for_and_does_not_join_a_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert run_to_the_end([sys.executable, "-c", CHILD, str(tmp_path / "pid"), "0"]) == (7, "False\n")


def test_an_interrupt_leaves_no_process_behind(tmp_path):
    started = tmp_path / "pid"

    def interrupt():
        while not (started.is_file() and started.read_text()):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_to_the_end([sys.executable, "-c", CHILD, str(started), "60"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
