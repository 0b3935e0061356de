"""The launch target: `accelerate launch -m lowmem.train RECIPE [a.b=c ...]` is `lowmem train` under a launcher.

On one GPU or a CPU, `python -m lowmem.train RECIPE` and `lowmem train RECIPE` do the same.
"""

from __future__ import annotations

import sys

from lowmem.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
