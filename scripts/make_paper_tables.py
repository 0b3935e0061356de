"""Hold our memory figures against those that papers and READMEs publish.

    python scripts/make_paper_tables.py [--out docs/results]

Published figures are literals in paper_tables/, each with the place where it stands; a figure of ours is computed:
weights and optimizer state exactly, on models without memory, the rest by simulating the steps for CUDA. Writes
paper_tables.json and paper_tables.md. A new optimizer needs a row in paper_tables/state_tables.py, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from paper_tables.figures import UNITS, Row, Table
from paper_tables.run_tables import run_tables
from paper_tables.state_tables import state_tables

ROOT = Path(__file__).parent.parent


def tables() -> list[Table]:
    return [*state_tables(), *run_tables()]


def compared(row: Row, table: Table) -> dict[str, Any]:
    """The row as plain data: our bytes, the unit the published figure is read in, and the difference in it."""
    ours, figure = row.ours.count(), float(row.published)
    units = UNITS if table.reads_as == "nearer" else [table.reads_as]
    reads_as = min(units, key=lambda unit: abs(ours / UNITS[unit] - figure))
    decimals = len(row.published.partition(".")[2])
    agrees = f"{ours / UNITS[reads_as]:.{decimals}f}" == row.published
    assert agrees or row.why, f"{row.what}: {ours / UNITS[reads_as]} is not {row.published}; say why"
    return {
        "what": row.what,
        "cited": f"{table.source}, {row.where}",
        "published": row.published,
        "ours_bytes": ours,
        "simulated": row.ours.simulated,
        "reads_as": reads_as,
        "difference": round(ours / UNITS[reads_as] / figure - 1, 4),
        "why": "Equal to the published digits." if agrees else row.why,
    }


def document() -> dict[str, Any]:
    """Every table with its rows compared, as plain data."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tables": [
            {
                "title": table.title,
                "source": table.source,
                "unit": table.unit,
                "conditions": table.conditions,
                "rows": [compared(row, table) for row in table.rows],
            }
            for table in tables()
        ],
    }


INTRODUCTION = """# Published memory figures and ours

Figures that papers and READMEs publish, against what lowmem computes for the same shapes and settings, as far as the
source states them. Weights, gradients and optimizer state of ours are exact, from the shapes and
`optimizer.state_bytes()`; rows marked * are simulated steps on CUDA, which are plans and not measurements. Sources
write "G" or "GB" for 10^9 and for 2^30 bytes alike: "reads as" is the unit that a source's exact figures fit (row by
row where one mixes them), and the difference is ours against the published figure in that unit.
"""


def markdown(document: dict[str, Any]) -> str:
    """The document as a page."""
    lines = [INTRODUCTION]
    for table in document["tables"]:
        lines += [f"## {table['title']}", "", f"Source: {link(table['source'])}. {table['conditions']}", ""]
        lines += ["| what | where | published | ours, GB | ours, GiB | reads as | difference | why |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in table["rows"]:
            cells = [
                row["what"] + (" *" if row["simulated"] else ""),
                row["cited"].removeprefix(table["source"] + ", "),
            ]
            cells += [f"{row['published']} {table['unit']}"]
            cells += [f"{row['ours_bytes'] / size:.3f}" for size in UNITS.values()]
            cells += [row["reads_as"], f"{row['difference']:+.1%}", row["why"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"Made by `make paper-tables` (`python scripts/make_paper_tables.py`) with torch {document['torch']} and "
        f"transformers {document['transformers']}; [the bytes](paper_tables.json)."
    )
    return "\n".join([*lines, ""])


def link(source: str) -> str:
    return f"[{source}](https://arxiv.org/abs/{source[6:]})" if source.startswith("arXiv:") else f"<{source}>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    out = parser.parse_args().out
    found = document()
    (out / "paper_tables.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "paper_tables.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
