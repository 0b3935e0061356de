"""The validation on a GPU, rehearsed on a CPU: small models, and the exact count of bytes in place of the allocator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowmem.memory.caching_allocator import CachingAllocator
from lowmem.optim.registry import OPTIMIZERS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_validate.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_validate  # noqa: E402
from gpu_validation import child, children, configurations, document, planned_and_measured  # noqa: E402
from gpu_validation.allocator_events import MIB, compare, random_events  # noqa: E402
from gpu_validation.configurations import CONFIGURATIONS, Configuration  # noqa: E402
from gpu_validation.loss_curves import loss_curves  # noqa: E402
from gpu_validation.operators import operators, planned_bytes  # noqa: E402
from gpu_validation.planned_and_measured import Run  # noqa: E402
from gpu_validation.table import results_markdown  # noqa: E402

LLAMA = "LLaMA-3.2-1B"
GOOD = Configuration("good", LLAMA, "name: sgd", tokens=256, layers=1)
BROKEN = Configuration("broken", LLAMA, "name: sgd", tokens=256, layers=1, also=("train.loss=half",))


@pytest.fixture
def only_two(monkeypatch):
    """A good run after a broken one, in this process, to save the seconds of new interpreters."""
    for module in (configurations, document, gpu_validate):
        monkeypatch.setattr(module, "CONFIGURATIONS", (BROKEN, GOOD))

    monkeypatch.setattr(child.fcntl, "flock", lambda file, how: None)  # held until a process ends

    def in_this_process(command, stdout, **how):
        return subprocess.CompletedProcess(command, gpu_validate.main(command[2:]))

    monkeypatch.setattr(
        children, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": in_this_process})
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_a_rehearsal_every_optimizer_needs_exactly_what_was_planned(name):
    chosen = Configuration("x", LLAMA, f"name: {name}", tokens=512, layers=1, checkpointing=False)
    run = Run(chosen, small=True)
    plan, measured = run.plan(on_cuda=False), run.measure(torch.device("cpu"), timed_steps=1)
    assert plan["peak_bytes"] == measured["peak_bytes"] > 0
    assert plan["parts"] == measured["parts"]
    assert measured["step_seconds"] > 0


@pytest.mark.parametrize("name", ["7b-int8-8gb", "7b-int8-12gb"])
def test_in_a_rehearsal_int8_weights_need_exactly_what_was_planned(name):
    run = Run(configurations.configuration(name), small=True)
    plan, measured = run.plan(on_cuda=False), run.measure(torch.device("cpu"), timed_steps=1)
    assert plan["peak_bytes"] == measured["peak_bytes"] > 0
    assert plan["parts"] == measured["parts"]


def test_a_card_that_is_played_leaves_the_allocator_what_the_small_one_would(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    assert child.as_small_as(8, 80 * 2**30) == 8 * 2**30
    assert asked == [pytest.approx((0.97 * 8 - 0.6) / 80, rel=1e-6)]
    assert child.as_small_as(96, 80 * 2**30) == 80 * 2**30


def test_every_optimizer_of_the_loss_curves_learns_the_same_batches():
    rows = list(loss_curves(torch.device("cpu"), small=True))
    assert len({row["losses"][0] for row in rows if "int8" not in row["method"]}) == 1, (
        "the same first weights"
    )
    assert all(row["losses"][-1] < row["losses"][0] for row in rows)
    assert [row["peak_bytes"] for row in rows] == [None] * len(rows), "counted on a GPU only"


def test_processes_of_their_own_run_one_configuration_without_any_extra(tmp_path):
    blocked = "import sys\nfor name in ('datasets', 'bitsandbytes', 'deepspeed'): sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--only",
        "1b-adamw-in-backward",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    by_name = {entry["name"]: entry for entry in found["configurations"]}
    assert list(by_name) == [each.name for each in CONFIGURATIONS], "every configuration has its place"
    asked = by_name.pop("1b-adamw-in-backward")
    assert (asked["status"], asked["error"], asked["reserved_error"]) == ("measured", 0.0, None)
    assert {(entry["status"], entry["reason"]) for entry in by_name.values()} == {
        ("not run", "not asked for")
    }
    assert found["conditions"]["packages"]["torch"] == torch.__version__


def test_a_configuration_that_fails_is_recorded_and_the_rest_runs(only_two, tmp_path):
    out = tmp_path / "found.json"
    words = ["--device", "cpu", "--only", "broken", "good", "allocator", "--out", str(out)]
    assert gpu_validate.main(words) == 1
    found = json.loads(out.read_text())
    broken, good = found["configurations"]
    assert broken["status"] == "failed"
    assert "train.loss" in broken["reason"]
    assert "measured" not in broken
    assert any("recipe" in place for place in broken["where"])
    assert good["status"] == "measured"
    assert good["error"] == 0
    assert found["allocator"]["status"] == "not run"


def test_what_is_left_when_the_time_is_up_is_marked(monkeypatch, tmp_path):
    monkeypatch.setattr(children, "subprocess", None)  # nothing may be started
    out = tmp_path / "found.json"
    assert gpu_validate.main(["--device", "cpu", "--minutes", "0", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    for entry in (*found["configurations"], found["operators"], found["allocator"]):
        assert (entry["status"], entry["reason"]) == ("not run", "out of time")


@pytest.mark.parametrize(
    ("code", "said", "status", "reason"),
    [
        (None, "", "not run", "out of time while measuring"),
        (-9, "Killed\n", "failed", "measuring ended with code -9: Killed"),
        (1, "Timeout (0:02:00)!\nThread 0x1", "failed", "measuring took too long"),
        (-11, "", "failed", "measuring ended with code -11: it said nothing"),
    ],
)
def test_a_process_that_dies_leaves_what_it_had_found_and_a_reason(code, said, status, reason):
    found = children.ended({"status": "failed", "stage": "measuring", "plan": {"peak_bytes": 1}}, code, said)
    assert found == {"status": status, "reason": reason, "plan": {"peak_bytes": 1}}


def test_a_run_that_the_card_cannot_hold_by_its_plan_is_not_begun(monkeypatch, tmp_path):
    class TooLarge:
        def __init__(self, chosen, *, small):
            assert not small

        def plan(self, *, on_cuda):
            return {"peak_bytes": 11 * 2**30, "reserved_bytes": 12 * 2**30}

        def measure(self, device, **how):
            raise AssertionError("it was begun")

    monkeypatch.setattr(planned_and_measured, "Run", TooLarge)
    small_card = SimpleNamespace(total_memory=12 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: small_card)
    findings = child.Findings(tmp_path / "part.json")
    child.run_task("7b-adamw", "cuda", findings, tmp_path / "lock", 60)
    assert findings.content["status"] == "not run"
    assert findings.content["reason"] == "planned 12.00 GiB reserved does not fit 12.00 GiB"
    assert json.loads((tmp_path / "part.json").read_text()) == findings.content


def test_an_error_says_the_place_without_the_folders_of_the_machine(tmp_path):
    try:
        BROKEN.recipe(small=True)
    except ValueError as error:
        places = child.place_of(error)
    assert all(re.fullmatch(r"\w+\.py:\d+ \w+", place) for place in places)
    assert child.explained(torch.OutOfMemoryError("tried to allocate 3 GiB")) == "out of memory"


def test_the_tables_show_every_number_of_a_result(tmp_path, capsys):
    record = document.Document("cuda", ["7b-adamw", "1b-lora", "operators", "allocator"], None)
    parts = dict.fromkeys(
        ("weights", "gradients", "optimizer_state", "activations", "temporary", "other"), 2**30
    )
    plan = {"peak_bytes": 6 * 2**30, "reserved_bytes": 8 * 2**30, "parts": parts}
    measured = {
        "peak_bytes": 5 * 2**30,
        "reserved_bytes": 10 * 2**30,
        "parts": parts | {"temporary": 0},
        "num_alloc_retries": 3,
        "step_seconds": 0.25,
        "tokens_per_second": 8192.0,
        "driver": {
            "taken_since_context_bytes": 2**33,
            "in_use_bytes": 11 * 2**30,
            "reserved_bytes": 10 * 2**30,
        },
    }
    record.record(
        "conditions", {"status": "measured", "gpu": "a card", "gpu_bytes": 2**34, "idle_bytes": 2**29}
    )
    record.record("7b-adamw", {"status": "measured", "plan": plan, "measured": measured})
    record.record("1b-lora", {"status": "failed", "reason": "measuring: out of memory", "plan": plan})
    difference = {"event": 7, "nbytes": 512}
    row = {"seed": 0, "events": 500, "first_difference": difference, "reserved_bytes": 2**30}
    row |= {"largest_allocated_difference_bytes": 0, "largest_reserved_difference_bytes": 2**21}
    record.record("allocator", {"status": "measured", "rows": [row]})
    svd = {
        "operator": "svd",
        "what": "512 x 512",
        "planned_bytes": 3 * 2**20,
        "measured_bytes": 2**22,
        "kept_bytes": 0,
    }
    record.record("operators", {"status": "measured", "rows": [svd]})
    curve = {"method": "a way", "lr": 2e-4, "losses": [5.0, 4.0], "last_losses_mean": 4.0}
    curve |= {"peak_bytes": 3 * 2**30, "tokens_per_second": 1024.0}
    record.record("loss_curves", {"status": "measured", "rows": [curve]})

    text = results_markdown(record.content)
    assert "a card with 16.00 GiB" in text
    run = "| 7b-adamw | LLaMA-2-7B, adamw, 1 x 2048 full | 6.00 | 5.00 | +20.00 % | 8.00 | 10.00 | -20.00 % "
    assert run + "| 3 | 0.25 | 8,192.0 |" in text
    assert "| 7b-adamw | +0.0 | +0.0 | +0.0 | +0.0 | +1,024.0 | +0.0 |" in text
    assert "| 7b-adamw | 10,240.00 | -2,048.00 | 10,752.00 | 512.00 | 614.40 |" in text
    assert "- 1b-lora: failed, measuring: out of memory" in text
    assert "| svd | 512 x 512 | 3.00 | 4.00 | 0.00 |" in text
    assert "| a way | 0.0002 | 2 | 5.000 | 4.000 | 3.00 | 1,024.0 |" in text
    assert "| 0 | 500 | event 7 | 0.00 | 2.00 | 1,024.00 |" in text
    document.write_json(tmp_path / "found.json", record.content)
    assert gpu_validate.main(["--table", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out == text


def test_the_list_has_every_name_and_other_names_are_refused(capsys):
    assert gpu_validate.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == document.task_names()
    with pytest.raises(SystemExit) as refused:
        gpu_validate.main(["--device", "cpu", "--only", "1b-galor"])
    assert refused.value.code == 2
    assert "1b-galor: not known" in capsys.readouterr().err


def test_every_configuration_is_a_valid_recipe_in_both_sizes():
    names = [each.name for each in CONFIGURATIONS]
    assert len(set(names)) == len(names) >= 12
    for each in CONFIGURATIONS:
        for small in (False, True):
            assert each.recipe(small=small).data.packing == (each.rows == "packed")
            assert each.shape(small=small)["num_hidden_layers"] >= 1


def test_random_events_free_what_lives_and_stay_below_their_bound():
    live: dict[int, int] = {}
    sizes = set()
    for event in random_events(0, 2000, 512 * MIB):
        if event.nbytes is None:
            del live[event.key]
        else:
            assert event.key not in live
            live[event.key] = event.nbytes
            sizes.add(event.nbytes)
        assert sum(live.values()) <= 512 * MIB
    borders = sorted({512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 64 * MIB})
    assert all(any(low < size <= high for size in sizes) for low, high in pairwise([0, *borders]))


def test_allocators_that_agree_have_no_first_difference_and_others_do():
    same = compare(random_events(1, 300, 512 * MIB), CachingAllocator(), CachingAllocator())
    assert same["events"] > 200
    assert same["first_difference"] is None
    assert same["largest_reserved_difference_bytes"] == 0

    other = compare(random_events(1, 300, 512 * MIB), CachingAllocator(expandable=True), CachingAllocator())
    first = other["first_difference"]
    before = random_events(1, 300, 512 * MIB)
    sides = CachingAllocator(expandable=True), CachingAllocator()
    for _, event in zip(range(first["event"]), before, strict=False):
        assert sides[0].reserved_bytes == sides[1].reserved_bytes
        for side in sides:
            side.free(event.key) if event.nbytes is None else side.malloc(event.key, event.nbytes)
    assert sides[1].reserved_bytes - sides[0].reserved_bytes == first["model_minus_real_reserved_bytes"] != 0


def test_operators_run_and_their_plan_is_the_stated_allowance_beside_their_tensors():
    planned = {}
    for operator in operators(small=True):
        made = operator.prepare("cpu")()
        assert all(torch.isfinite(tensor).all() for tensor in made), operator
        planned[operator.name, operator.what] = planned_bytes(operator)
    assert planned["matrix product", "128 x 128 float32"] == 0
    assert planned["svd", "64 x 64 float32"] >= 3 * 64 * 64 * 4
    backward = planned["attention backward", "32/32 heads of 128, 64 tokens, bfloat16, causal"]
    assert backward >= 4 * 32 * 64 * (128 + 1)


def test_the_page_says_whether_a_gpu_has_confirmed_the_plan():
    page = (ROOT / "docs" / "gpu_validation.md").read_text()
    results = ROOT / "docs" / "results" / "gpu_validation.json"
    is_unconfirmed = "not yet confirmed on a GPU" in page
    assert is_unconfirmed != results.is_file()
    if results.is_file():
        assert results_markdown(json.loads(results.read_text())) in page
