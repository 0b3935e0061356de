"""`lowmem export`: int8 weights as plain float safetensors."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json

DTYPES = ("bfloat16", "float32", "float16")


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "export",
        "Write a model with int8 weights as float safetensors that transformers loads without lowmem. Of a run, its "
        "final model is taken, or its newest checkpoint.",
    )
    parser.add_argument(
        "target", metavar="RUN_OR_MODEL", help="a run folder, or a folder with config.json and weights"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default what the model computes in"
    )
    parser.add_argument("--out", metavar="DIR", help="a new folder; by default RUN_OR_MODEL-DTYPE")
    parser.add_json()
    options = parser.read(arguments)
    from lowmem.hf.export import export
    from lowmem.memory.wording import size

    done = export(options.target, dtype=options.dtype, out=options.out)
    if options.json:
        print_json(
            {
                "source": str(done.source),
                "folder": str(done.folder),
                "dtype": done.dtype,
                "tensors": done.tensors,
                "bytes": done.nbytes,
            }
        )
    else:
        print(
            f"{done.source}: {done.tensors} tensors, {size(done.nbytes)} in {done.dtype}, written to {done.folder}"
        )
    return 0
