"""memory.json, the terminal table, and the report of a run folder in Markdown and HTML.

Everything is made from the files of the folder alone, so a report can be written again at any time and
on any machine.
"""

from __future__ import annotations

from pathlib import Path

from lowmem.errors import FaultError
from lowmem.memory.content import report_blocks
from lowmem.memory.document import memory_document
from lowmem.memory.html import html
from lowmem.memory.markdown import markdown
from lowmem.memory.plots import plot_loss, plot_memory, plot_throughput
from lowmem.memory.run_files import RunFiles, read_run
from lowmem.memory.table import table

__all__ = ["memory_document", "table", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write report.md, report.html and plots/*.png into the run's folder; returns the path of report.md.

    What is missing or torn there is named in the report. Raises RecipeError where there is no run at all
    and FaultError where the folder cannot be written.
    """
    run = read_run(run_dir)
    try:
        pictures = _draw(run)
        blocks = report_blocks(run, pictures)
        (run.path / "report.html").write_text(html(blocks, run.path), encoding="utf-8")
        (run.path / "report.md").write_text(markdown(blocks), encoding="utf-8")
    except OSError as error:
        raise FaultError(f"the report cannot be written to {run.path}: {error.strerror}.") from error
    return run.path / "report.md"


def _draw(run: RunFiles) -> set[str]:
    """The names of the pictures in plots/. One that cannot be drawn any more is removed, not left behind."""
    plots = run.path / "plots"
    plots.mkdir(exist_ok=True)
    drawn = set()
    if run.memory is not None:
        plot_memory(run.memory, plots / "memory.png")
        drawn.add("memory.png")
    if plot_loss(run.training, run.evaluations, plots / "loss.png"):
        drawn.add("loss.png")
    if plot_throughput(run.training, plots / "throughput.png"):
        drawn.add("throughput.png")
    for name in {"memory.png", "loss.png", "throughput.png"} - drawn:
        (plots / name).unlink(missing_ok=True)
    return drawn
