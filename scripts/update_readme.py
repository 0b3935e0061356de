"""Put a run's memory table, numbers and picture into README.md, between its demo markers.

    make demo && python scripts/update_readme.py runs/demo-...

Everything between `<!-- demo -->` and `<!-- /demo -->` is rewritten from the run's own files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from lowmem.memory.document import HEADLINE
from lowmem.memory.table import table

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo -->", "<!-- /demo -->"


def evaluations(run: Path) -> list[dict]:
    """The evaluation rows of a run, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row]


def seconds(run: Path) -> float:
    """Training time of the last logged step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["seconds"] for row in reversed(rows) if "seconds" in row)


def demo_section(run: Path) -> str:
    """What the demo showed, in Markdown."""
    document = json.loads((run / "memory.json").read_text())
    before, after = evaluations(run)[0], evaluations(run)[-1]
    conditions = document["conditions"]
    state = document["parts"]["optimizer_state"]
    adamw_state = document["baselines"][HEADLINE]["parts"]["optimizer_state"]
    return "\n".join(
        [
            START,
            f"`make demo` trains {conditions['parameters']:,} parameters from scratch in {seconds(run):.0f} s"
            f" on a CPU. Right answers to problems it has never seen:"
            f" **{before['exact_match']:.0%} before, {after['exact_match']:.0%} after**."
            f" Optimizer state: **{1 - state / adamw_state:.0%} less** than AdamW's;"
            f" peak memory: **{document['saved_fraction']:.0%} less**, every byte counted on the same batch:",
            "",
            "```text",
            table(document),
            "```",
            "",
            "![Peak memory by part, GaLore against AdamW](docs/images/demo_memory.png)",
            END,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished quickstart run")
    run = parser.parse_args().run
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    (ROOT / "README.md").write_text(before + demo_section(run) + after)
    (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "plots" / "memory.png", ROOT / "docs" / "images" / "demo_memory.png")
    print("README.md and docs/images/demo_memory.png are those of", run)


if __name__ == "__main__":
    main()
