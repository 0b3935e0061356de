"""Put the plan of the shipped 1B recipe into README.md, between its plan markers.

    python scripts/update_plan_example.py

The model's configuration is written to a scratch folder, so that nothing is downloaded: of Llama-3.2-1B the shape
in `make_fit_picture.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import tempfile
from pathlib import Path

from lowmem.cli.main import main as lowmem

ROOT = Path(__file__).parent.parent
START, END = "<!-- plan -->", "<!-- /plan -->"
COMMAND = "lowmem plan recipes/llama32_1b_galore.yaml --gpu rtx4060"


def plan_section() -> str:
    """The command and what it prints, in Markdown."""
    config = runpy.run_path(str(ROOT / "scripts" / "make_fit_picture.py"))["MODELS"]["Llama-3.2-1B"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        model = Path("Llama-3.2-1B")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
        os.symlink(ROOT / "recipes", "recipes")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            lowmem([*COMMAND.split()[1:], f"model.name_or_path=./{model}"])
    lines = [line.rstrip() for line in printed.getvalue().replace("./Llama", "Llama").splitlines()]
    return "\n".join([START, "```text", f"$ {COMMAND}", *lines, "```", END])


def main() -> None:
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(START)
    (ROOT / "README.md").write_text(before + plan_section() + rest.split(END)[1])
    print("README.md holds the plan of", COMMAND)


if __name__ == "__main__":
    main()
