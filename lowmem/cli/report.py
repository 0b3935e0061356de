"""`lowmem report`: the report of finished runs, written again from what the run folder holds."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("report", "Write report.md, report.html and plots/ of finished runs again.")
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="a run folder")
    parser.add_json()
    options = parser.read(arguments)
    from lowmem.memory.report import table, write_report
    from lowmem.memory.run_files import read_run

    runs = {run: read_run(run) for run in options.runs}  # all of them, before the first report is written
    reports = {run: write_report(run) for run in runs}
    if options.json:
        print_json([{"run": run, "report": str(report)} for run, report in reports.items()])
        return 0
    for run, report in reports.items():
        memory = runs[run].memory
        if memory is not None:
            print(table(memory))
        print(f"wrote {report}")
    return 0
