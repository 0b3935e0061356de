from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from lowmem.errors import FaultError, RecipeError
from lowmem.memory.ledger import PARTS
from lowmem.memory.measure import Measured
from lowmem.memory.report import memory_document, table, write_report

MIB = 2**20
CONDITIONS = {
    "model": "builtin:tiny-llama",
    "parameters": 812345,
    "dtype": "float32",
    "sequence_length": 64,
    "activation_checkpointing": False,
    "device": "cpu",
    "torch": "2.13.0",
}


def measured(scale: float, **more) -> Measured:
    parts = dict(zip(PARTS, (int(scale * weight * MIB) for weight in (4, 4, 8, 2, 1, 0)), strict=True))
    return Measured(sum(parts.values()), None, parts, 3, "tracked", sum(parts.values()) - 512, **more)


def document(**baselines) -> dict:
    baselines = baselines or {"adamw_fused": measured(1), "adamw_foreach": measured(1.2)}
    return memory_document(measured(0.5), baselines, CONDITIONS)


def run_folder(folder: Path, *, memory: dict | None = None, rows: list[dict] | None = None) -> Path:
    rows = rows if rows is not None else [training_row(step, 5 - step / 20) for step in range(10, 60, 10)]
    (folder / "memory.json").write_text(json.dumps(memory or document()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("model:\n  name_or_path: tiny_*model*\noptimizer:\n  name: galore\n")
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "gpus": [], "packages": {"torch": "2.13"}})
    )
    return folder


def training_row(step: int, loss: float | str | None) -> dict:
    return {
        "step": step, "epoch": step / 60, "loss": loss, "lr": 1e-3, "grad_norm": None, "tokens": 100 * step,
        "tokens_per_second": 5000.0 + step, "peak_allocated_bytes": None, "seconds": step / 2,
    }  # fmt: skip


def eval_row(step: int, loss: float, **more) -> dict:
    return {"step": step, "eval_loss": loss, "eval_perplexity": 2.5, **more}


def decoded(path: Path):
    """Height, width, channels of a PNG that can be decoded."""
    return imread(path).shape


# ------------------------------------------------------------------ memory.json


def test_the_document_has_every_key_and_null_for_what_is_unknown():
    found = memory_document(measured(0.5), {"adamw_fused": None}, CONDITIONS)
    assert set(found) >= {
        "source", "peak_bytes", "reserved_bytes", "parts", "baselines", "saved_bytes", "saved_fraction", "fits",
        "gpu_bytes", "conditions",
    }  # fmt: skip
    assert found["source"] == "measured"
    assert set(found["baselines"]) == {"adamw_fused", "adamw_foreach", "adamw_fused_backward"}
    unknown = [found[key] for key in ("reserved_bytes", "saved_bytes", "saved_fraction", "fits", "gpu_bytes")]
    assert [*unknown, *found["baselines"].values()] == [None] * 8
    assert sum(found["parts"].values()) == found["peak_bytes"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_saving_is_against_fused_adamw_and_may_be_negative():
    found = document()
    assert found["saved_bytes"] == 19 * MIB - 19 * MIB // 2
    assert found["saved_fraction"] == pytest.approx(0.5)
    assert found["baselines"]["adamw_foreach"]["peak_bytes"] == sum(measured(1.2).parts.values())
    assert found["baselines"]["adamw_foreach"]["source"] == "measured"
    worse = memory_document(measured(2), {"adamw_fused": measured(1)}, {})
    assert worse["saved_bytes"] == -19 * MIB
    assert worse["saved_fraction"] == pytest.approx(-1)


@pytest.mark.parametrize(("gib", "fits"), [(10.9, True), (10.8, False)])
def test_a_card_fits_what_was_reserved_and_the_context(gib, fits):
    on_gpu = Measured(9 * 2**30, 10 * 2**30 - 2**25, dict.fromkeys(PARTS, 0), 3, "allocator")
    # 10 GiB - 32 MiB and 0.6 GiB against 97 % of the card: it takes 10.896 GiB
    assert memory_document(on_gpu, {}, {}, gpu_bytes=int(gib * 2**30))["fits"] is fits


def test_why_a_baseline_is_missing_is_kept_and_shown():
    found = document(adamw_fused=measured(1), adamw_foreach="out of memory")
    assert found["baselines"]["adamw_foreach"] is None
    assert found["not_measured"] == {"adamw_foreach": "out of memory"}
    assert "AdamW foreach was not measured: out of memory" in table(found)


# ------------------------------------------------------------------ the terminal table


def test_the_table_fits_80_columns_with_all_baselines():
    every = {name: measured(1) for name in ("adamw_fused", "adamw_foreach", "adamw_fused_backward")}
    text = table(memory_document(measured(0.5), every, {**CONDITIONS, "note": "x " * 100}))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert all(line == line.rstrip() for line in text.splitlines())


def test_the_table_shows_each_part_the_peak_and_the_saving():
    lines = table(document()).splitlines()
    assert lines[0].split("  ")[0] == "MiB"
    rows = {line[:16].strip(): line[16:].split() for line in lines[:12]}
    assert rows["weights"] == ["2.00", "4.00", "4.80"]
    assert rows["optimizer state"] == ["4.00", "8.00", "9.60"]
    assert rows["peak"] == ["9.50", "19.00", "22.80"]
    assert "saved 9.50 MiB (50.0 %) against AdamW fused" in lines
    assert "activation checkpointing no" in "\n".join(lines)
    assert "parameters 812,345" in "\n".join(lines)


def test_a_run_that_needs_more_than_adamw_says_so():
    text = table(memory_document(measured(2), {"adamw_fused": measured(1)}, {}))
    assert "needs 19.00 MiB (100.0 %) more than AdamW fused" in text


def test_without_baseline_the_table_has_the_run_only():
    text = table(memory_document(measured(0.5), {}, CONDITIONS))
    assert "AdamW" not in text
    assert "saved" not in text


@pytest.mark.parametrize(
    ("nbytes", "unit"), [(700, "B"), (5000, "KiB"), (3 * 2**20, "MiB"), (7 * 2**30, "GiB")]
)
def test_the_unit_fits_the_largest_number(nbytes, unit):
    one = Measured(nbytes, None, {**dict.fromkeys(PARTS, 0), "weights": nbytes}, 1, "tracked")
    assert table(memory_document(one, {}, {})).split()[0] == unit


def test_a_small_part_is_not_shown_as_nothing():
    parts = {**dict.fromkeys(PARTS, 0), "weights": 7 * 2**30, "other": 512}
    text = table(memory_document(Measured(sum(parts.values()), None, parts, 1, "tracked"), {}, {}))
    assert re.search(r"^other +<0\.01$", text, re.MULTILINE)
    assert re.search(r"^gradients +0\.00$", text, re.MULTILINE)


def test_reserved_bytes_and_warnings_appear_where_there_are_any():
    one = Measured(
        MIB, 2 * MIB, {**dict.fromkeys(PARTS, 0), "weights": MIB}, 3, "allocator", warnings=["it was full"]
    )
    text = table(memory_document(one, {}, {}))
    assert re.search(r"^reserved +2\.00$", text, re.MULTILINE)
    assert "Warning: this run: it was full" in text


# ------------------------------------------------------------------ the report of a run folder


class Page(HTMLParser):
    """Collects attributes that load something and checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.tables = 0
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self._open.append(tag)
        self.tables += tag == "table"
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def test_a_whole_run_gives_markdown_html_and_three_pictures(tmp_path):
    rows = [training_row(step, 5 - step / 20) for step in range(10, 60, 10)]
    rows += [eval_row(20, 4.5, exact_match=0.05), eval_row(50, 2.6, exact_match=0.8)]
    written = write_report(run_folder(tmp_path, rows=rows))
    assert written == tmp_path / "report.md"
    text = written.read_text()
    assert "# tiny\\_\\*model\\* fine-tuned with galore" in text
    assert "| **peak** | **9.50** | **19.00** | **22.80** |" in text
    assert "Held-out loss from 4.5 to 2.6. Exact match from 0.05 to 0.8." in text
    assert "sequence length | 64" in text
    assert "Not in this report" not in text
    for name in ("memory", "loss", "throughput"):
        height, width, channels = decoded(tmp_path / "plots" / f"{name}.png")
        assert 300 <= height <= 1200
        assert 800 <= width <= 2000
        assert channels == 4
        assert f"(plots/{name}.png)" in text


def test_the_html_report_is_one_file_that_loads_nothing(tmp_path):
    write_report(run_folder(tmp_path))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.tables >= 3
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)


def test_names_from_files_cannot_break_out_of_the_html(tmp_path):
    folder = run_folder(tmp_path, memory={**document(), "conditions": {"model": "<script>alert(1)</script>"}})
    (folder / "recipe.yaml").write_text("a: </code><script>\n```\nb")
    write_report(folder)
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    Page(text)
    assert "````yaml" in (folder / "report.md").read_text()


@pytest.mark.parametrize("name", ["memory.json", "metrics.jsonl", "recipe.yaml", "environment.json"])
def test_each_missing_file_is_named_and_the_rest_is_reported(tmp_path, name):
    folder = run_folder(tmp_path)
    write_report(folder)
    (folder / name).unlink()
    text = write_report(folder).read_text()
    assert f"- {name.replace('_', chr(92) + '_')} is missing" in text
    assert "## Not in this report" in text
    assert (folder / "plots" / "memory.png").exists() is (name != "memory.json"), (
        "no picture of an older report"
    )
    assert (folder / "plots" / "loss.png").exists() is (name != "metrics.jsonl")
    assert ("## Memory" in text) is (name != "memory.json")


def test_a_torn_last_line_is_said_and_the_others_count(tmp_path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "loss": 1.')
    text = write_report(folder).read_text()
    assert "metrics.jsonl:6 is not a row of metrics (the run ended while it was written)." in text
    assert "Training loss 4.5 at step 10, 2.5 at step 50." in text


@pytest.mark.parametrize(
    "damage", ['{"peak_bytes": 12', "[]", '{"peak_bytes": "12", "parts": {}}', "{}", "\xff"]
)
def test_damaged_memory_json_is_said_and_never_a_crash(tmp_path, damage):
    folder = run_folder(tmp_path)
    (folder / "memory.json").write_text(damage, encoding="latin-1")
    text = write_report(folder).read_text()
    assert "- memory.json" in text
    assert "the memory the run needed is unknown." in text
    assert "## Loss" in text


def test_damaged_recipe_and_environment_are_said(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "recipe.yaml").write_text("a: [")
    (folder / "environment.json").write_text("{")
    text = write_report(folder).read_text()
    assert "recipe.yaml is not a YAML mapping" in text
    assert "environment.json is not JSON (line 1" in text
    assert f"# Run {tmp_path.name}".replace("_", "\\_") in text


def test_no_run_at_all_is_an_error_for_people(tmp_path):
    with pytest.raises(RecipeError, match=r"holds no run: none of memory\.json"):
        write_report(tmp_path)
    with pytest.raises(RecipeError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_fault_and_no_traceback(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "plots").write_text("in the way")
    with pytest.raises(FaultError, match="cannot be written"):
        write_report(folder)


def test_without_baseline_the_report_shows_the_run_only(tmp_path):
    folder = run_folder(tmp_path, memory=memory_document(measured(0.5), {}, CONDITIONS))
    text = write_report(folder).read_text()
    assert "There is no AdamW run beside it" in text
    assert "| MiB | this run |\n" in text
    with_baselines = tmp_path / "with"
    with_baselines.mkdir()
    write_report(run_folder(with_baselines))
    alone, beside = (decoded(path / "plots" / "memory.png")[0] for path in (folder, with_baselines))
    assert alone < beside, "one bar is less high than three"


def test_nan_losses_are_shown_as_nan_and_do_not_break_the_curve(tmp_path):
    rows = [
        training_row(10, 4.0),
        training_row(20, "NaN"),
        training_row(30, None),
        training_row(40, "Infinity"),
    ]
    text = write_report(run_folder(tmp_path, rows=rows)).read_text()
    assert "Training loss 4 at step 10, Infinity at step 40." in text
    assert "It was NaN or infinite at 2 logged step(s), first at step 20." in text
    assert decoded(tmp_path / "plots" / "loss.png")[1] >= 800


def test_a_run_of_nothing_but_nan_still_has_its_report(tmp_path):
    rows = [training_row(10, "NaN"), {**eval_row(10, 1), "eval_loss": "NaN", "eval_perplexity": "NaN"}]
    text = write_report(run_folder(tmp_path, rows=rows)).read_text()
    assert "Training loss NaN at step 10" in text
    assert "| 10 | NaN | NaN |" in text


def test_a_run_with_evaluations_only_and_one_with_no_rows(tmp_path):
    text = write_report(run_folder(tmp_path, rows=[eval_row(0, 5.0)])).read_text()
    assert "Held-out loss 5." in text
    assert not (tmp_path / "plots" / "throughput.png").exists()
    text = write_report(run_folder(tmp_path, rows=[])).read_text()
    assert "metrics.jsonl holds no training step yet." in text
    assert "## Loss" not in text


def test_rows_of_a_resumed_run_are_drawn_in_order_of_steps(tmp_path):
    rows = [training_row(30, 3.0), training_row(10, 4.0), training_row(20, 3.5)]
    text = write_report(run_folder(tmp_path, rows=rows)).read_text()
    assert "Training loss 4 at step 10, 3 at step 30." in text


def test_a_report_is_the_same_when_it_is_written_again(tmp_path):
    folder = run_folder(tmp_path)
    names = ("report.md", "report.html", "plots/memory.png")
    write_report(folder)
    first = [(folder / name).read_bytes() for name in names]
    write_report(folder)
    assert [(folder / name).read_bytes() for name in names] == first


def test_reports_are_written_without_torch():
    program = (
        "import sys, lowmem.memory.report; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ------------------------------------------------------------------ planned against measured


def planned(scale: float) -> Measured:
    one = measured(scale)
    return Measured(one.peak_bytes, None, one.parts, 3, "simulated", one.steady_peak_bytes)


def test_the_document_holds_the_plan_beside_the_measurement_with_its_error():
    found = memory_document(measured(1), {}, CONDITIONS, planned=planned(1.05))
    assert found["planned"]["source"] == "simulated"
    assert found["planned"]["error"] == pytest.approx(0.05, abs=1e-6)
    assert found["warnings"] == []
    assert "planned 19.95 MiB for the same steps, +5.0 % of what was measured" in table(found)


def test_a_run_far_over_its_plan_says_so_and_names_the_part():
    real = measured(1)
    more = dict(real.parts, activations=real.parts["activations"] + 6 * MIB)
    run = Measured(sum(more.values()), None, more, 3, "tracked")
    found = memory_document(run, {}, CONDITIONS, planned=planned(1))
    (warning,) = found["warnings"]
    assert warning.startswith("the run needed 6.00 MiB (31.6 %) more than its plan of 19.00 MiB")
    assert "activations differ most, 8.00 MiB instead of 2.00 MiB" in warning


def test_a_run_slightly_over_its_plan_gives_no_warning():
    assert memory_document(measured(1.09), {}, CONDITIONS, planned=planned(1))["warnings"] == []


def test_why_there_is_no_plan_is_in_the_document_and_the_table():
    found = memory_document(measured(1), {}, CONDITIONS, planned="the simulation failed: no luck")
    assert found["planned"] is None
    assert "not planned: the simulation failed: no luck" in table(found)


def test_a_report_of_a_planned_run_says_how_far_off_the_plan_was(tmp_path):
    document = memory_document(measured(1), {}, CONDITIONS, planned=planned(0.98))
    write_report(run_folder(tmp_path, memory=document))
    for name in ("report.md", "report.html"):
        assert "-2.0 % of what was measured" in (tmp_path / name).read_text()
