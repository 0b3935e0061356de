"""`lowmem export`: int8 weights as plain float safetensors, or a run for another number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json

DTYPES = ("bfloat16", "float32", "float16")


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "export",
        "Write a model with int8 weights as float safetensors that transformers loads without lowmem. Of a run, its "
        "final model is taken, or its newest checkpoint. With --optimizer, write a run that another number of "
        "processes, or another strategy, goes on with.",
    )
    parser.add_argument(
        "target", metavar="RUN_OR_MODEL", help="a run folder, or a folder with config.json and weights"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default what the model computes in"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="a new folder; by default RUN_OR_MODEL-DTYPE, or RUN-whole"
    )
    parser.add_argument(
        "--optimizer", action="store_true", help="of a run: weights, and optimizer state for any launch"
    )
    parser.add_json()
    options = parser.read(arguments)
    if options.optimizer:
        return _export_run(parser, options)
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


def _export_run(parser: Arguments, options: Any) -> int:
    if options.dtype is not None:
        parser.error("--dtype is for a model, and --optimizer exports a run with the weights as they are")
    from lowmem.hf.export_optimizer import export_run
    from lowmem.memory.wording import size

    done = export_run(options.target, out=options.out)
    if options.json:
        print_json(
            {
                "source": str(done.source),
                "folder": str(done.folder),
                "processes": done.processes,
                "parameters": done.parameters,
                "state_bytes": done.nbytes,
            }
        )
        return 0
    print(
        f"{done.source}: weights, and state of {done.parameters} parameters ({size(done.nbytes)}) from "
        f"{done.processes} process{'es' if done.processes > 1 else ''}, written to {done.folder}\n"
        f"Any launch goes on with it: ... -m lowmem.train {done.folder}/recipe.yaml save.dir={done.folder}"
    )
    return 0
