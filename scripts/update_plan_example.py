"""Put the plans of two shipped recipes into README.md and docs/int8.md, between their plan markers.

    python scripts/update_plan_example.py

The models' configurations are written to a scratch folder, so that nothing is downloaded: of each the shape in
`model_shapes.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from model_shapes import MODELS

from lowmem.cli.main import main as lowmem

ROOT = Path(__file__).parent.parent
START, END = "<!-- plan -->", "<!-- /plan -->"
EXAMPLES = {
    "README.md": ("Llama-3.2-1B", "lowmem plan recipes/llama32_1b_galore.yaml --gpu rtx4060"),
    "docs/int8.md": ("LLaMA-2-7B", "lowmem plan recipes/llama2_7b_8gb.yaml --gpu rtx4060"),
}


def plan_section(name: str, command: str) -> str:
    """The command and what it prints for the model `name`, in Markdown."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        model = Path(name)
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODELS[name]))
        os.symlink(ROOT / "recipes", "recipes")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            lowmem([*command.split()[1:], f"model.name_or_path=./{model}"])
    lines = [line.rstrip() for line in printed.getvalue().replace("./", "").splitlines()]
    return "\n".join([START, "```text", f"$ {command}", *lines, "```", END])


def main() -> None:
    for page, (name, command) in EXAMPLES.items():
        before, rest = (ROOT / page).read_text().split(START)
        (ROOT / page).write_text(before + plan_section(name, command) + rest.split(END)[1])
        print(page, "holds the plan of", command)


if __name__ == "__main__":
    main()
