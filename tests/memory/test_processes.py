"""processes.json and what a report makes of it."""

from __future__ import annotations

import json

import pytest

from lowmem.memory.processes import HeldByProcesses, process_lines, process_table, processes_document
from lowmem.memory.report import write_report

HELD = HeldByProcesses([3 * 2**20, 3 * 2**20], [2**20, 2**19], None)
PLANNED = HeldByProcesses([3 * 2**20, 3 * 2**20], [2**20, 2**18], None)


def document(held: HeldByProcesses = HELD, planned: HeldByProcesses | str | None = PLANNED) -> dict:
    return json.loads(json.dumps(processes_document(held, "zero3", steps=4, planned=planned)))


def test_what_was_not_measured_is_null_with_its_reason_and_no_row():
    found = document(planned="lora: no formula")
    assert found["optimizer_state_bytes"] == {"least": 2**19, "most": 2**20}
    assert found["peak_allocated_bytes"] is None
    assert found["planned"] is None
    assert found["not_measured"].keys() == {"peak_allocated_bytes", "planned"}
    assert "peak allocated" not in process_table(found).splitlines()[-1]
    text = " ".join(process_lines(found))
    assert "Not planned: lora: no formula." in text
    assert "The peak allocated is not measured: on a CPU" in text


def test_nothing_is_said_of_a_plan_that_nobody_asked_for():
    found = document(planned=None)
    assert "planned" not in found["not_measured"]
    assert "lanned" not in process_table(found)


def test_a_peak_that_an_allocator_has_counted_is_a_row_and_has_no_plan():
    found = document(HeldByProcesses(HELD.weights, HELD.optimizer_state, [2**23, 2**24]))
    assert found["not_measured"] == {}
    row = next(line for line in process_table(found).splitlines() if line.startswith("peak allocated"))
    assert row.split() == ["peak", "allocated", "8.00", "16.00", "-", "-"]


def test_the_table_fits_80_columns_and_shows_both_sides():
    text = process_table(document())
    assert max(len(line) for line in text.splitlines()) <= 80
    row = next(line for line in text.splitlines() if line.startswith("optimizer state"))
    assert row.split() == ["optimizer", "state", "0.50", "1.00", "0.25", "1.00"]
    assert "each of 2 processes under zero3" in text


def test_a_report_has_the_processes_and_says_that_the_peak_is_unknown(tmp_path):
    (tmp_path / "processes.json").write_text(json.dumps(document()))
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path).read_text()
    assert "## Memory of each process" in text
    assert "| weights | 3.00 | 3.00 | 3.00 | 3.00 |" in text
    assert "memory.json is missing" in text


@pytest.mark.parametrize("text", ['{"world": 2', "[]", '{"world": 2}'])
def test_a_torn_or_strange_file_is_named_and_left_out(tmp_path, text):
    (tmp_path / "processes.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")
    report = write_report(tmp_path).read_text()
    assert "what each process held is unknown" in report
    assert "## Memory of each process" not in report


@pytest.mark.parametrize("name", ["weights_bytes", "optimizer_state_bytes", "planned", "not_measured"])
def test_a_document_without_one_of_its_keys_is_not_shown(tmp_path, name):
    torn = document()
    torn[name] = 7
    (tmp_path / "processes.json").write_text(json.dumps(torn))
    (tmp_path / "metrics.jsonl").write_text("")
    report = write_report(tmp_path).read_text()
    assert "processes.json is not a document of lowmem" in report
