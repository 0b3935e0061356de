"""`lowmem report`: the report of finished runs, written again from what the run folder holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json
from lowmem.errors import RecipeError


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("report", "Write report.md, report.html and plots/ of finished runs again.")
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="a run folder")
    parser.add_json()
    options = parser.read(arguments)
    runs = [Path(run) for run in options.runs]
    missing = [
        f"{run}: is not a folder. Name the folder of a run (save.dir)." for run in runs if not run.is_dir()
    ]
    if missing:
        raise RecipeError(missing)
    from lowmem.memory.report import table, write_report

    reports = {run: write_report(run) for run in runs}
    if options.json:
        print_json([{"run": str(run), "report": str(report)} for run, report in reports.items()])
        return 0
    for run, report in reports.items():
        memory = run / "memory.json"
        if memory.is_file():
            print(table(json.loads(memory.read_text(encoding="utf-8"))))
        print(f"wrote {report}")
    return 0
