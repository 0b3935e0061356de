"""`lowmem report`: the report of finished runs and comparisons, written again from what the folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("report", "Write the report and plots/ of finished runs and comparisons again.")
    parser.add_argument("runs", metavar="DIR", nargs="+", help="the folder of a run, or of lowmem compare")
    parser.add_json()
    options = parser.read(arguments)
    from lowmem.memory.comparison import is_comparison, read_comparison, write_comparison
    from lowmem.memory.comparison import table as comparison_table
    from lowmem.memory.report import table, write_report
    from lowmem.memory.run_files import read_run

    # All of them are read before the first report is written.
    compared = {run: read_comparison(run) for run in options.runs if is_comparison(run)}
    runs = {run: read_run(run) for run in options.runs if run not in compared}
    tables = {run: comparison_table(document) for run, document in compared.items()}
    tables |= {run: table(found.memory) for run, found in runs.items() if found.memory is not None}
    reports = {
        run: write_comparison(compared[run], Path(run)) if run in compared else write_report(run)
        for run in options.runs
    }
    if options.json:
        print_json([{"run": run, "report": str(report)} for run, report in reports.items()])
        return 0
    for run, report in reports.items():
        if run in tables:
            print(tables[run])
        print(f"wrote {report}")
    return 0
