"""Hold the memory plan against a real GPU: plan each of some training runs, then run it, and compare.

    python scripts/gpu_validate.py                      # all of it on one CUDA device, in under 9 minutes
    python scripts/gpu_validate.py --list
    python scripts/gpu_validate.py --only 1b-galore operators --out some.json
    python scripts/gpu_validate.py --device cpu         # a rehearsal: small models, the exact count of bytes
    python scripts/gpu_validate.py --table docs/results/gpu_validation.json

Models have the real shapes and random weights; nothing is downloaded. Each task is a process of its own
with a time limit: one that fails is recorded with its reason and the others go on. The results are written
after every task. Also compared are single operators' workspaces with the allowance of a plan, and the
model of the caching allocator with the real one.

Leaves with code 1 when something failed, 2 for wrong arguments. docs/gpu_validation.md explains the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lowmem need not be installed

from gpu_validation.children import Children, went_well
from gpu_validation.configurations import CONFIGURATIONS
from gpu_validation.document import CONDITIONS, Document, settings, task_names
from gpu_validation.table import described, results_markdown

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "gpu_validation.json"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--minutes", type=float, default=8.5, help="the whole time there is (8.5)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these alone; --list shows the names")
    parser.add_argument("--list", action="store_true", help="print what can be run, in its order")
    parser.add_argument("--out", type=Path, help=f"results file; a whole run on a GPU has {RESULTS.name}")
    parser.add_argument("--table", type=Path, metavar="PATH.json", help="only print the tables of a file")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one stage of one task (120)")
    for name in ("--child", "--part", "--lock"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)

    if arguments.child:
        return _be_a_child(arguments)
    if arguments.list:
        known = {each.name: described(settings(each)) for each in CONFIGURATIONS}
        print("\n".join(f"{name:24s} {known.get(name, '')}".rstrip() for name in task_names()))
        return 0
    if arguments.table:
        print(results_markdown(json.loads(arguments.table.read_text(encoding="utf-8"))), end="")
        return 0
    return _validate(parser, arguments)


def _validate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    known = task_names()
    unknown = [name for name in arguments.only or [] if name not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not known; names are {', '.join(known)}")
    if arguments.device == "cuda" and not _has_cuda():
        parser.error("there is no CUDA device here; --device cpu rehearses on small models")
    tasks = [name for name in known if not arguments.only or name in (CONDITIONS, *arguments.only)]
    is_whole = arguments.device == "cuda" and not arguments.only
    document = Document(arguments.device, tasks, arguments.out or (RESULTS if is_whole else None))
    Children(arguments.device, document, 60 * arguments.minutes, arguments.limit).run(tasks)
    print(results_markdown(document.content), end="")
    return 0 if went_well(document) else 1


def _be_a_child(arguments: argparse.Namespace) -> int:
    from gpu_validation.child import Findings, run_task

    findings = Findings(Path(arguments.part))
    run_task(arguments.child, arguments.device, findings, Path(arguments.lock), arguments.limit)
    return 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
